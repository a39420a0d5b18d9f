"""Weights in TorchScript archives: the tensors that torch.jit.load returns, and nothing runs."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipfix.models.convert import read
from clipfix.models.torchscript import read_torchscript


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4).half()
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("table", torch.randn(6, 4).T)  # strides

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.T[:4].T


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.blocks = Inner(), nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
        self.shared = self.blocks[0].weight
        self.scale = nn.Parameter(torch.ones([]) * 4.6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("how", ["script", "trace"])
def test_tensors_are_those_of_torch(how, tmp_path):
    module, path = Outer().eval(), tmp_path / "archive.pt"
    archive = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.randn(2, 4))
    archive.save(path)
    expected, found = torch.jit.load(path).state_dict(), read_torchscript(path)
    assert found.keys() >= expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class Runs(nn.Module):
    """A module whose archive runs code when torch.jit.load reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        raise AssertionError("the archive ran")


def test_program_of_an_archive_does_not_run(tmp_path):
    path = tmp_path / "runs.pt"
    torch.jit.script(Runs()).save(path)
    with pytest.raises(Exception, match="the archive ran"):
        torch.jit.load(path)
    assert read(path) == {}


def test_archive_with_other_objects_is_refused_in_one_line(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "attack.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("attack/code/__torch__.py", "")
        archive.writestr("attack/data.pkl", pickle.dumps(Attack(), protocol=2))
    with pytest.raises(ValueError, match=r"attack\.pt is a TorchScript archive .*torch\.jit\.load") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
