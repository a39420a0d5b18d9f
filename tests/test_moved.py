"""Names of modules that moved: what an earlier version stored still reads, exports and compares."""

import json
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import SETTINGS, run

import clipfix.cli.resolvers as resolvers
from clipfix import CONF, PACKAGE
from clipfix.data.sets.coco import COCO
from clipfix.models.clip import Backbone, weights_hash
from clipfix.results import identity
from clipfix.results.compare.examples import published
from clipfix.results.compare.results import Group, check_comparable, read
from clipfix.system import moved

# All that the configs of 0.1 named, before modules were sorted into folders.
OLD = [
    "annotate.captions.Captions", "annotate.features.Features", "annotate.latents.Latents", "backbone.Backbone",
    "callbacks.Finite", "callbacks.Progress", "callbacks.SaveFolder", "callbacks.Throughput",
    "checkpoints.SameBuckets", "checkpoints.SaveWhenStopped", "checkpoints.WholeFiles", "data.ShardData",
    "diffusion.Diffusion", "diffusion.blank", "evals.classification.Classification", "evals.foils.Foils",
    "evals.groups.Groups", "evals.lengths.Lengths", "evals.multilabel.MultiLabel", "evals.pairs.Pairs",
    "evals.probes.Probes", "evals.retrieval.Retrieval", "evals.zeroshot.ZeroShot", "methods.denoise.Denoise",
    "methods.diva.DIVA", "methods.fff.FFF", "methods.finetune.Finetune", "methods.longclip.LongCLIP",
    "mining.promoted.Promoted", "samples.Reconstructions", "samples.Samples", "scenes.KINDS",
    "scenes.COLOURS", "sets.coco.COCO", "sets.dci.DCI", "sets.docci.DOCCI", "sets.flickr30k.Flickr30k",
    "sets.imagenet.ImageNet", "sets.mmvp.MMVP", "sets.named.Named", "sets.sharegpt4v.ShareGPT4V",
    "sets.sugarcrepe.SugarCrepe", "sets.urban1k.Urban1k", "sets.winoground.Winoground", "sharegpt4v.prepare",
    "strategy.FSDP2",
]  # fmt: skip
OLD_CONFIG = {
    "seed": 0,
    "wise": None,
    "method": {"_target_": "clipfix.methods.finetune.Finetune", "steps": 3, "optimizer": {"name": "AdamW", "lr": 0.1}},
    "data": {
        "_target_": "clipfix.data.ShardData",
        "train": "shards",
        "prepare": {"_target_": "clipfix.scenes.prepare", "_partial_": True, "root": "shards", "seed": 0},
        "texts": {"caption": {"key": "txt", "pick": "one", "k": 1}},
        "batch_size": 8,
    },
    "backbone": {"_target_": "clipfix.backbone.Backbone", "name": str(PACKAGE / "tiny" / "clip"), "pretrained": None},
}


@pytest.mark.parametrize("name", moved.MOVED)
def test_every_new_name_is_there(name):
    resolve_name(moved.MOVED[name])
    assert moved.current_name(moved.MOVED[name]) == moved.MOVED[name], "today's name is no old one"


@pytest.mark.parametrize("name", OLD)
def test_whatever_a_config_named_is_found(name):
    found = resolve_name(moved.current_name(f"clipfix.{name}"))
    assert getattr(found, "__name__", name.rpartition(".")[2]) == name.rpartition(".")[2]


def test_only_names_of_targets_change():
    nested = {"a": [{"_target_": "clipfix.sets.coco.COCO", "path": "clipfix.sets"}], "text": "clipfix.sets.coco.COCO"}
    expected = {"a": [{"_target_": "clipfix.data.sets.coco.COCO", "path": "clipfix.sets"}], "text": nested["text"]}
    assert moved.current(nested) == expected
    assert nested["a"][0]["_target_"] == "clipfix.sets.coco.COCO"  # the argument is as it was
    by_path = {"_target_": "hydra.utils.get_object", "path": "clipfix.scenes.KINDS"}
    assert moved.current(by_path) == by_path | {"path": "clipfix.data.scenes.KINDS"}
    assert moved.current_name("clipfix.setsuna.X") == "clipfix.setsuna.X"


# -- the recipe --------------------------------------------------------------------------------------------------------


def recipe(method: dict, **data) -> dict:
    config = OLD_CONFIG | {"method": OLD_CONFIG["method"] | method, "data": OLD_CONFIG["data"] | data}
    return identity.repair(OmegaConf.create(config))["recipe"]


def test_the_recipe_knows_classes_but_not_their_modules():
    def anchored(target: str) -> dict:
        return recipe({"anchor": {"_target_": target, "weight": 0.1}})

    assert anchored("a.FeatureAnchor") == anchored("b.c.FeatureAnchor")
    assert anchored("a.FeatureAnchor") != anchored("a.SimilarityAnchor")
    assert recipe({}, prepare={"_target_": "x.prepare", "root": "a"}) == recipe(
        {}, prepare={"_target_": "y.prepare", "root": "b"}
    )


def test_any_data_config_has_a_recipe():
    config = OLD_CONFIG | {"data": {"_target_": "mine.Episodes", "train": "clips"}}
    assert identity.repair(OmegaConf.create(config))["recipe"]["data"] == {}


@pytest.mark.parametrize(
    ("method", "control"),
    [
        ({}, None),
        ({"control": "shuffled"}, "shuffled"),
        ({"shuffled": True}, "shuffled"),
        ({"shuffled": False}, None),
        ({"mining": {"shuffled": True}}, "shuffled"),
    ],
)
def test_the_control_of_a_method(method, control):
    assert (
        identity.repair(OmegaConf.create(OLD_CONFIG | {"method": OLD_CONFIG["method"] | method}))["control"] == control
    )


# -- what is on disk ---------------------------------------------------------------------------------------------------


def test_an_old_run_folder_is_found_to_resume(tmp_path):
    folder = tmp_path / "2025-01-01_00-00-00"
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OLD_CONFIG))
    own = moved.current(OLD_CONFIG)
    assert own["backbone"]["_target_"] == "clipfix.models.clip.Backbone"
    assert resolvers.newest_same_run(tmp_path, own) == folder
    assert resolvers.newest_same_run(tmp_path, own | {"seed": 1}) is None


@pytest.fixture
def old_checkpoint(tmp_path) -> str:
    """A checkpoint as a fit of 0.1 left it, with other weights than the tiny CLIP's."""
    backbone = Backbone(OLD_CONFIG["backbone"]["name"], pretrained="random")
    state = {f"backbone.{name}": weight for name, weight in backbone.state_dict().items()}
    saved = {"state_dict": state, "config_yaml": OmegaConf.to_yaml(OLD_CONFIG), "batches_seen": 3, "global_step": 3}
    torch.save(saved | {"hash": weights_hash(backbone.model)}, tmp_path / "old.ckpt")
    return str(tmp_path / "old.ckpt")


def test_an_old_checkpoint_exports(old_checkpoint, clipfix):
    clipfix("run=export", f"checkpoint={old_checkpoint}", "to=open_clip", "output=out")
    assert weights_hash(Backbone("out/open_clip").model) == torch.load(old_checkpoint)["hash"]
    assert json.loads(Path("out/open_clip/provenance.json").read_text())["method"] == "finetune"


def test_an_old_checkpoint_is_scored(old_checkpoint, clipfix):
    folder, _ = clipfix("run=eval", f"checkpoint={old_checkpoint}", "eval=none", "trainer=cpu", "logger=csv")
    results = json.loads((folder / "results.json").read_text())
    assert results["weights"]["score"] == torch.load(old_checkpoint)["hash"]
    assert results["recipe"]["method"]["_target_"] == "Finetune"


def test_old_and_new_results_compare(tmp_path):
    """Settings of benchmarks hold dotted names, and other settings are refused."""
    kinds = {"_target_": "hydra.utils.get_object", "path": "clipfix.scenes.KINDS"}
    old = SETTINGS | {"zeroshot": {"questions": {"shape": {"classes": kinds}}}}
    new = json.loads(json.dumps(old).replace("clipfix.scenes", "clipfix.data.scenes"))
    results = [read(run(tmp_path / "old", benchmarks=old)), read(run(tmp_path / "new", benchmarks=new, seed=1))]
    check_comparable(results)
    new["zeroshot"]["questions"]["shape"]["classes"]["path"] = "clipfix.data.scenes.COLOURS"
    with pytest.raises(ValueError, match=r"zeroshot.*path.*KINDS|zeroshot.*path.*COLOURS"):
        check_comparable([results[0], read(run(tmp_path / "other", benchmarks=new, seed=2))])


def test_pictures_of_an_old_result_are_read_from_the_published_set(tmp_path):
    shards = {"_target_": "clipfix.sets.coco.COCO", "root": "coco", "fetch": "", "samples": None}
    shards |= {"pictures": "val2017", "annotations": "captions.json"}
    path = run(tmp_path / "old", benchmarks=SETTINGS | {"retrieval_long": {"shards": shards}})
    settings = Group("old", [read(path)]).fact("benchmarks")["retrieval_long"]
    assert isinstance(published(settings["shards"]), COCO)
    with pytest.raises(ValueError, match=r"os\.getcwd"):
        published({"_target_": "os.getcwd"})


def test_todays_configs_hold_no_old_name():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["hydra.run.dir=."])
    node = OmegaConf.to_container(config)
    assert moved.current(node) == node
