"""Reads the tensors of a TorchScript archive, such as OpenAI's CLIP files, without running its program.

`torch.jit.load` compiles the archived program and may run parts of it. Such an archive is a zip file: `data.pkl` is a
pickle of the modules and their attributes, and each storage of tensors is a file in `data/`. The pickle is read here
with nothing but the few names that it needs for tensors; every other name is refused.
"""

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


class Module:
    """A module of the archive. Only its attributes are read."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module in it is restored by code of its own")
        self.__dict__.update(state)


class ArchiveUnpickler(pickle.Unpickler):
    """Unpickles the modules of an archive. Only modules without code, tensors, and lists of numbers can appear."""

    def __init__(self, archive: ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}data.pkl"))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return Module
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")):
            return rebuild
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle" and name in LISTS:
            return list
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, reference: Any) -> Tensor:
        kind, dtype, key, _, size = reference
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("it refers to something other than tensors")
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype)[:size] if content else torch.empty(0).to(dtype)
        return self.storages[key]


def rebuild(storage: Tensor, offset: int = 0, size: Any = None, stride: Any = None, *_: Any) -> Tensor:
    """Return the tensor at an offset of a storage; for a parameter, whose first argument is its tensor, that tensor."""
    return storage if size is None or stride is None else storage.as_strided(size, stride, offset)


def is_archive(path: Path) -> bool:
    """Return whether a zip file is a TorchScript archive."""
    return any("/code/" in member for member in ZipFile(path).namelist())


def read(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the archived modules by name, as `torch.jit.load(path).state_dict()` would.

    Raises:
        ValueError: if the archive is damaged or has anything but modules and tensors.
    """
    try:
        with ZipFile(path) as archive:
            folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
            return dict(tensors(ArchiveUnpickler(archive, folder).load()))
    except Exception as error:  # a damaged pickle raises errors of nearly any type
        raise refusal(path, error) from error


def refusal(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"{path} is a TorchScript archive of which the tensors cannot be read ({reason}). Its program is not run. If "
        "you trust the file, write its weights to another one: "
        "torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'weights.pt')"
    )


def tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module and of the modules in it, by dotted name."""
    attributes: Mapping[str, Any] = vars(module)
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Module):
            yield from tensors(value, f"{prefix}{name}.")
