"""Small text towers and tokens of known lengths, for the packed text tower."""

import open_clip
import torch
from torch import Tensor, nn

CONTEXT, START, END = 80, 98, 99
TEXT = {"context_length": CONTEXT, "vocab_size": 100, "width": 32, "heads": 4, "layers": 3}
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1}
TOWERS = {
    "plain": {},
    "quick gelu": {"quick_gelu": True},
    "layer scale": {"text_cfg": TEXT | {"ls_init_value": 0.1}},
    "one layer": {"text_cfg": TEXT | {"layers": 1}},
}
LENGTHS = {
    "mixed": [33, 2, CONTEXT, 7, 32, 31, 64, 7, 65, 3],
    "one text": [41],
    "equal": [20] * 5,
    "empty texts": [2, 2],
    "whole context": [CONTEXT, CONTEXT],
}


def texts(lengths: list[int]) -> Tensor:
    """Return random words between start and end tokens, padded with zeros."""
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(1, START, (length,))
        row[0], row[length - 1] = START, END
    return tokens


def build(**changes: object) -> nn.Module:
    """Return open_clip's model with random weights. Initial ones and zeros in norms and biases would hide mistakes."""
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**{"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT} | changes)
    for parameter in model.text.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def gradients(text: nn.Module, features: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss in which each feature of each text has a different factor."""
    weights = torch.linspace(-1, 1, features.numel()).view_as(features).cos()
    trained = {name: weight for name, weight in text.named_parameters() if weight.requires_grad}
    grads = torch.autograd.grad((features * weights).sum(), list(trained.values()))
    return dict(zip(trained, grads, strict=True))
