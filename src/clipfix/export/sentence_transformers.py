"""sentence-transformers 6 and later: it reads the folder of transformers, for texts and pictures."""

from clipfix.export import transformers
from clipfix.export.folder import Files
from clipfix.models.clip import Backbone


def files(backbone: Backbone) -> Files:
    """Return the files of a CLIP; refuse SigLIP, whose texts need full length and are padded to the longest here."""
    _, config = transformers.model(backbone)
    if config["model_type"] != "clip":
        raise ValueError(
            f"sentence-transformers cannot hold {backbone.name}: it pads texts to the longest of a batch, and SigLIP's "
            "features are right at its full length alone. Choose export.to=transformers."
        )
    return transformers.files(backbone)
