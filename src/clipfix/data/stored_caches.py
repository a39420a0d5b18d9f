"""Features that the code of Tip-Adapter and APE stored: `keys_{K}shots.pt` and the files beside it."""

import pickle
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

TEXT = "text_weights_cupl_t.pt"


class StoredCache(NamedTuple):
    """Features with one row per item, in fp32 on the CPU. Rows are as stored: not normalized here."""

    keys: Float[Tensor, "n d"]  # of the cached pictures
    values: Float[Tensor, "n c"]  # their one-hot labels
    val: Float[Tensor, "v d"]
    val_labels: Int[Tensor, " v"]
    test: Float[Tensor, "t d"]
    test_labels: Int[Tensor, " t"]
    text: Float[Tensor, "c d"]


def read_cache(folder: str, shots: int) -> StoredCache:
    """Return the features that the authors' code stored for one data set.

    Their files hold fp16 tensors of a GPU: `keys_{K}shots.pt` [D, N], `values_{K}shots.pt` [N, C], `{val,test}_f.pt`
    [n, D], `{val,test}_l.pt` [n] and `text_weights_cupl_t.pt` [D, C]. Only tensors are read, never code.

    Args:
        folder: the folder with the files of one data set.
        shots: K.

    Raises:
        ValueError: a file is missing or no tensor, shapes do not fit each other, a value is not finite, or a label is
            none of the C classes.
    """
    home = Path(folder).expanduser()
    keys, values = home / f"keys_{shots}shots.pt", home / f"values_{shots}shots.pt"
    found = StoredCache(
        read_tensor(keys, 2).float().T.contiguous(),
        read_tensor(values, 2).float(),
        read_tensor(home / "val_f.pt", 2).float(),
        read_tensor(home / "val_l.pt", 1).long(),
        read_tensor(home / "test_f.pt", 2).float(),
        read_tensor(home / "test_l.pt", 1).long(),
        read_tensor(home / TEXT, 2).float().T.contiguous(),
    )
    (items, width), classes = found.keys.shape, len(found.text)
    expected = {
        values: (found.values, (items, classes)),
        home / TEXT: (found.text.T, (width, classes)),
        home / "val_f.pt": (found.val, (len(found.val_labels), width)),
        home / "test_f.pt": (found.test, (len(found.test_labels), width)),
    }
    for file, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{file} is {list(tensor.shape)}, but {list(shape)} fits {keys.name} [{width}, {items}] and the files "
                "beside it: they must be of one data set and one model."
            )
    if items != shots * classes:
        raise ValueError(f"{keys} has {items} pictures, but {shots} shots of {classes} classes are {shots * classes}.")
    for name, labels in ("val_l.pt", found.val_labels), ("test_l.pt", found.test_labels):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"{home / name} has labels outside of 0 to {classes - 1}: {TEXT} has {classes} classes.")
    return found


def read_tensor(file: Path, dims: int) -> Tensor:
    """Return the tensor of a file, on the CPU; ValueError if it holds anything else."""
    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        hint = ", but not for ImageNet, whose val_f.pt is the test split" if file.name.startswith("test_") else ""
        raise ValueError(f"There is no {file}: the code of Tip-Adapter or APE writes it{hint}.") from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as a tensor ({reason}): write it again.") from None
    if not isinstance(tensor, Tensor) or tensor.ndim != dims:
        kind = f"of shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(f"{file} is {kind}, but must be a tensor with {dims} dimension{'s' if dims > 1 else ''}.")
    if not tensor.isfinite().all():
        raise ValueError(f"{file} has values that are not finite: write it again.")
    return tensor
