"""Tensors of a TorchScript archive, read without running or compiling the program in it.

`torch.jit.load` compiles the program and runs its `__setstate__` methods. OpenAI publishes CLIP's weights in this form.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import Tensor

DTYPES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
LISTS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist")


class Node:
    """A module of the archive: its attributes are in `__dict__`. No code of the archive belongs to it."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return the tensors of an archive by their names in the state dict of its module.

    Raises:
        pickle.UnpicklingError: if the archive holds anything else than modules, tensors and plain values.
    """
    with ZipFile(path) as archive:
        (data,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = data.removesuffix("data.pkl")
        with archive.open(data) as file:
            module = _Unpickler(file, lambda key: archive.read(f"{root}data/{key}")).load()
    return dict(_tensors(module, ""))


class _Unpickler(pickle.Unpickler):
    """Builds modules as `Node`s and tensors of bytes; refuses every other class and function."""

    def __init__(self, file: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self.read = read
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return Node
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch.jit._pickle" and name in LISTS:
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, _: value
        raise pickle.UnpicklingError(f"{module}.{name} is neither a module nor a tensor")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.read(key))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _tensors(node: Node, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(node).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, Node):
            yield from _tensors(value, f"{prefix}{name}.")
