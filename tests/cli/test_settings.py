"""Settings that no class checks: each verb refuses wrong ones in one line, within a second."""

import pytest
import torch
from omegaconf import OmegaConf

from clipfix.cli.settings import READ_BY
from clipfix.cli.verbs import VERBS, check_same_method

WRONG = [
    ("compare.resamples=0", "greater than or equal to 1"),
    ("compare.resamples=abc", "valid integer"),
    ("compare.resamples=null", "valid integer"),
    ("compare.resamples=1.5", "valid integer"),
    ("compare.coverage=abc", "valid number"),
    ("compare.coverage=1", "less than 1"),
    ("compare.examples=null", "valid integer"),
    ("compare.examples_from=everywhere", "'files', 'urls' or 'commands'"),
    ("compare.results=5", "valid list"),
    ("compare.results=[null]", "valid string"),
    ("seed=[1]", "valid integer"),
    ("seed=-1", "greater than or equal to 0"),
    ("+compare.bogus=1", "does not exist"),
    ("~compare.gain", "is missing"),
    (f"compare.gain={'a' * 5000}", "shorter"),
    (f"checkpoint={'a' * 5000}", "shorter"),
    ("export.dtype=fp8", "'fp32', 'fp16' or 'bf16'"),
    ("export.overwrite=maybe", "valid boolean"),
    ("survey.samples=1", "greater than or equal to 2"),
    ("report.table=ful", "'headlines' or 'full'"),
    ("wise=much", "valid number"),
]


@pytest.mark.parametrize(("word", "reason"), WRONG, ids=[word[:30] for word, _ in WRONG])
def test_wrong_settings_are_named_in_one_line(word, reason, clipfix):
    with pytest.raises(SystemExit) as error:
        clipfix("run=compare", word)
    first, *rest = str(error.value).splitlines()
    key = word.lstrip("+~").partition("=")[0]
    assert first.startswith(f"clipfix: {key}")
    assert reason in first
    assert len(rest) == 1  # how to see a traceback
    assert len(first) < 300


@pytest.mark.parametrize("run", VERBS)
def test_every_verb_checks_them(run, clipfix):
    with pytest.raises(SystemExit, match=r"compare\.coverage is 2.*; export\.dtype is"):
        clipfix(f"run={run}", "compare.coverage=2", "export.dtype=fp8")


VALUES = {"checkpoint": "x.ckpt", "resume": "auto", "wise": "0.5", "survey.samples": "8",
          "export.dtype": "fp16"}  # fmt: skip


@pytest.mark.parametrize("key", VALUES)
def test_a_key_that_a_verb_does_not_read_is_refused(key, clipfix):
    for run in set(VERBS) - set(READ_BY[key.partition(".")[0]]):
        with pytest.raises(SystemExit, match=rf"run={run} does not read {key}\. .*(Set|set|leave it out)"):
            clipfix(f"run={run}", f"{key}={VALUES[key]}")


def test_a_checkpoint_of_another_method_is_not_resumed(tmp_path):
    def config(method: str, **changed) -> dict:
        target = f"clipfix.methods.{method}.{method.title()}"
        backbone = {"_target_": "clipfix.models.clip.Backbone", "name": "x"}
        return {"method": {"_target_": target, **changed}, "seed": 0, "data": {"train": "x"}, "backbone": backbone}

    path = str(tmp_path / "last.ckpt")
    stored = OmegaConf.to_yaml(OmegaConf.create(config("finetune")))
    torch.save({"state_dict": {}, "batches_seen": 1, "config_yaml": stored}, path)
    check_same_method(path, OmegaConf.create(config("finetune")))
    with pytest.raises(ValueError, match=r"with method finetune, and this one has diva"):
        check_same_method(path, OmegaConf.create(config("diva") | {}))
    with pytest.raises(ValueError, match=r"with control None, and this one has shuffled"):
        check_same_method(path, OmegaConf.create(config("finetune", shuffled=True)))
