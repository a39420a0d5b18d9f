"""sentence-transformers 6 and later: the folder of transformers as it is, read for texts and for pictures."""

from clipfix.export import transformers
from clipfix.export.folder import Files
from clipfix.models.clip import Backbone


def files(backbone: Backbone) -> Files:
    """Of CLIP alone: a text is padded to the longest of its batch there, and SigLIP is trained on the full length."""
    _, config = transformers.model(backbone)
    if config["model_type"] != "clip":
        raise ValueError(
            f"sentence-transformers cannot hold {backbone.name}: it pads texts to the longest of a batch, and SigLIP's "
            "features are right at its full length alone. Choose export.to=transformers."
        )
    return transformers.files(backbone)
