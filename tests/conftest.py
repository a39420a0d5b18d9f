"""Fixtures of small models and worlds. Shapes in signatures are checked, and W&B and the model hub are offline."""

import json
import os
import sys
from pathlib import Path

import pytest
from generators import write_generator
from jaxtyping import install_import_hook

os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
CHECKED = (
    "functional", "methods", "parts", "evals", "models.packed_text", "data.decoding", "data.module", "data.sets",
    "data.shards", "data.stored", "data.stream", "data.texts",
)  # fmt: skip
install_import_hook([f"clipfix.{name}" for name in CHECKED], "beartype.beartype")

import clipfix.cli.resolvers  # noqa: E402  registers what the configs use in ${...}

# `make test` distributes files to the workers in this order, the longest first, so that all workers end together.
LONGEST = (
    "test_fits.py", "test_fsdp.py", "test_scores.py", "test_ranks.py", "test_launch.py", "test_data.py",
    "test_resume.py", "test_export.py", "test_composition.py", "test_diffusion.py", "test_mistakes.py",
    "test_consumers.py", "test_command.py", "test_mutations.py", "test_samples.py", "test_notebooks.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an open_clip folder of a ViT with 4 x 4 patches; load it with pretrained=random."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return str(folder)


@pytest.fixture(scope="session")
def generator_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="session")
def vocabulary() -> dict[str, int]:
    """Return CLIP's vocabulary, with the start and end tokens named as in transformers."""
    from open_clip.tokenizer import SimpleTokenizer

    words = SimpleTokenizer().encoder
    return {word.replace("_of_", "of").replace("<start", "<|start").replace("<end", "<|end").replace("text>", "text|>")
            if word in ("<start_of_text>", "<end_of_text>") else word: n for word, n in words.items()}  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the argument for a drawn world with every split, for the arguments of `front_door`."""
    from front_door import WORLD
    from worlds import drawn

    return drawn(tmp_path_factory, "scenes", *WORLD)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the argument for a small drawn world with little to score, for the arguments of `small_runs`."""
    from small_runs import RUN
    from worlds import drawn

    return drawn(tmp_path_factory, "world", *RUN)


@pytest.fixture
def clipfix(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command in an empty folder and returns the newest run folder and the output."""
    from clipfix.__main__ import main

    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[Path, str]:
        monkeypatch.setattr(sys, "argv", ["clipfix", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)  # `main` sets it
        main()
        runs = sorted(tmp_path.glob("outputs/**/results.json"), key=os.path.getmtime)
        return (runs[-1].parent if runs else tmp_path), capsys.readouterr().out

    return command
