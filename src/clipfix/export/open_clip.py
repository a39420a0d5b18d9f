"""open_clip's own folder: `open_clip.create_model_and_transforms("local-dir:folder")`. It supports every model."""

from open_clip.tokenizer import HFTokenizer

from clipfix.export.folder import Files, Weights
from clipfix.export.tokenizer import hub_files
from clipfix.models.clip import Backbone
from clipfix.models.pretrained import CONFIG_FILE, WEIGHT_FILES


def files(backbone: Backbone) -> Files:
    """Return config and weights, and the tokenizer if it is not open_clip's own; open_clip reads it from the folder.

    `text_cfg.context_length` is the length of a stretched text tower, for model and tokenizer. If it were still 77,
    open_clip would silently interpolate the position table back.
    """
    state, described = backbone.as_open_clip()
    content: Files = {CONFIG_FILE: described, WEIGHT_FILES[0]: Weights(state)}
    if "hf_tokenizer_name" in backbone.config["text_cfg"]:
        tokenizer = backbone.tokenizer
        assert isinstance(tokenizer, HFTokenizer)
        content |= hub_files(tokenizer.tokenizer, backbone.context_length, clean=None)
    return content
