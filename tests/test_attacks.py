"""Files from outside that carry code, commands or markup. Each attack would create a file; none may."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipfix.models import convert


class RunsWhenLoaded(nn.Module):
    """A TorchScript module whose program writes a file while it is loaded: `from_file` creates what it maps."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.weight, self.training = path, nn.Parameter(torch.ones(2)), False

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool, str]:
        return self.weight, self.training, self.path

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool, str]) -> None:
        mapped = torch.from_file(state[2], shared=True, size=4)
        self.weight, self.training, self.path = state[0] + mapped.sum(), state[1], state[2]


def test_the_program_of_a_torchscript_archive_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.script(RunsWhenLoaded(str(tmp_path / "ran"))).save(file := tmp_path / "evil.pt")
    with monkeypatch.context() as patched:
        patched.setattr(torch.jit, "load", None)
        with pytest.raises(ValueError, match=r"evil\.pt is a TorchScript archive .*not run") as error:
            convert.read(file)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    torch.jit.load(file)
    assert (tmp_path / "ran").exists(), "the archive is harmless, so nothing was tested"


def test_the_tensors_of_a_torchscript_archive_are_those_of_torch(tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(3, 4).half(), nn.BatchNorm1d(4), nn.Linear(4, 4))
    layers[2].weight.data = torch.randn(4, 4).T  # a view with other strides
    torch.jit.script(layers).save(file := tmp_path / "weights.pt")
    expected = torch.jit.load(file).state_dict()
    state = convert.read(file)
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert state[name].dtype == weight.dtype
        assert torch.equal(state[name], weight)
    whole = file.read_bytes()
    for damaged in (whole[:-200], whole.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.pt"):
            convert.read(file)
