"""The whole program: compose the config, build, score, train, score again, report."""

import copy
import difflib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException

# Heavy libraries are imported inside the verbs: `--help`, `--cfg job` and a mistyped key must answer at once.

PACKAGE = Path(__file__).parent
# An installed wheel carries conf/ inside the package; in a checkout it lies at the top, where people look.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parents[1] / "conf") if folder.is_dir())


# Warnings about what is meant to be so, which would push the table off the screen.
HARMLESS = (
    r"Found \d+ module\(s\) in eval mode",  # frozen models rest in eval mode
    r"`isinstance\(treespec, LeafSpec\)`",  # between Lightning and torch
    r"Total length of `list` across ranks is zero",  # a run without a selection split
    r"You defined a `validation_step` but have no",  # the same
    r"Checkpoint directory .* exists and is not empty",  # a resumed run
    r"y_pred contains classes not in y_true",  # a probe on a small test split
    r"WebDataset\(shardshuffle=...\) is None",  # clip_benchmark reads in order, and means to
)


# -- verbs: one a run --------------------------------------------------------------------------------------------------


def fit(cfg: DictConfig, folder: Path) -> None:
    """Score, train, score what the selection split prefers, report."""
    started = time.perf_counter()
    backbone, benchmarks = build(cfg)
    from lightning.pytorch.callbacks import LambdaCallback

    from clipfix import provenance, report
    from clipfix.backbone import weights_hash
    from clipfix.evals import evaluate
    from clipfix.evals.features import TextCache
    from clipfix.wise import WiSE

    # What is scored, before and with the repair loaded. A method may rebuild its own backbone: Long-CLIP, LoRA.
    scored = copy.deepcopy(backbone)
    method, data = method_and_data(cfg, backbone)  # missing shards are named before anything is scored
    method.config_yaml = OmegaConf.to_yaml(cfg, resolve=True)
    scores: dict[str, dict[str, float]] = {}
    weights: dict[str, str] = {}
    facts: dict[str, Any] = {}
    texts: TextCache = {}  # most repairs leave the text tower as it is

    def rate(when: str, trainer: Any) -> None:
        scored.to(trainer.strategy.root_device)
        scores[when] = evaluate(scored, benchmarks, texts)
        if trainer.is_global_zero:
            weights[when] = weights_hash(scored.model)
            facts.update(facts or provenance.facts(scored, benchmarks))
        scored.to("cpu")  # training wants the memory

    # Asked for by a callback, as only then all ranks are there to share the work.
    before = LambdaCallback(on_fit_start=lambda trainer, _: rate("before", trainer))
    callbacks = dict(instantiate(cfg.callbacks)) | selection(cfg, folder) | {"before": before}
    watched = callbacks["selection"].benchmarks.values() if "selection" in callbacks else ()
    chosen_by = [source for benchmark in watched for source in benchmark.sources().values()]
    seen = {"data.train": [data.train], "data.selection": [data.selection], "eval.selection": chosen_by}
    provenance.check_splits(benchmarks, seen)
    if cfg.wise is not None:
        callbacks["wise"] = WiSE(cfg.wise)
    loggers = list(instantiate(cfg.logger).values())
    trainer = instantiate(cfg.trainer, callbacks=[c for c in callbacks.values() if c is not None], logger=loggers)

    if trainer.is_global_zero:
        (folder / "config.yaml").write_text(method.config_yaml)
        report.describe(config_and_choices(cfg), loggers)
    trainer.fit(method, data, ckpt_path=checkpoint_to_resume(cfg.resume, folder), weights_only=True)

    last = folder / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(last)
    best = callbacks["best"].best_model_path if "best" in callbacks else ""
    # A run of no steps never asked which is best: it shows what a method changes at once.
    chosen = trainer.strategy.broadcast(best or str(last))
    step = load_repair(scored, chosen)["global_step"]
    rate("after", trainer)
    if trainer.is_global_zero:
        facts |= origin(cfg) | asked(cfg)
        facts |= {"weights": weights, "precision": {"scores": "fp32", "training": cfg.trainer.precision}}
        seconds = time.perf_counter() - started
        facts |= {"checkpoint": os.path.relpath(chosen, folder), "step": step, "seed": cfg.seed, "seconds": seconds}
        report.write(folder, scores, benchmarks, facts, loggers)


def score(cfg: DictConfig, folder: Path) -> None:
    """Score the backbone, or a checkpoint of an earlier run, without training."""
    started = time.perf_counter()
    backbone, benchmarks = build(cfg)
    from lightning.fabric import Fabric

    from clipfix import provenance, report
    from clipfix.backbone import weights_hash
    from clipfix.evals import evaluate

    if cfg.data.prepare and cfg.data.prepare.root in str(asked(cfg)):  # a benchmark reads what it makes
        instantiate(cfg.data.prepare)()
    repair = load_repair(backbone, cfg.checkpoint) if cfg.checkpoint else {}
    ranks = Fabric(**{key: cfg.trainer[key] for key in ("accelerator", "devices", "num_nodes") if key in cfg.trainer})
    ranks.launch()
    scores = {"score": evaluate(backbone.to(ranks.device), benchmarks)}
    if ranks.is_global_zero:
        facts = provenance.facts(backbone, benchmarks)
        facts |= origin(OmegaConf.create(repair["config_yaml"]) if repair else None) | asked(cfg)
        facts |= {"weights": {"score": weights_hash(backbone.model)}, "precision": {"scores": "fp32"}}
        facts |= {"checkpoint": cfg.checkpoint, "seed": cfg.seed, "seconds": time.perf_counter() - started}
        report.write(folder, scores, benchmarks, facts)
    ranks.barrier()  # who is done tidies the folder up, while it is empty


def compare(cfg: DictConfig, folder: Path) -> None:
    """Results of earlier runs side by side: a table, pictures and report.html. No model is loaded."""
    from clipfix.compare import compare

    published: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    pictures = compare(folder, cfg.seed, published, **cfg.compare)
    if cfg.logger.get("wandb"):  # Lightning and W&B take seconds to import: after the table is read
        from clipfix import report

        logger = instantiate(cfg.logger.wandb, name="compare", group="compare")
        report.describe({"compare": OmegaConf.to_container(cfg.compare)}, [logger])
        for path in pictures:
            report.show(f"compare/{path.stem}", path, [logger])


def workspace(cfg: DictConfig, folder: Path) -> None:
    """Save the W&B workspace that clipfix/workspace.py defines, for the benchmarks of `eval`, as a new view."""
    if "wandb" not in cfg.logger:
        raise ValueError("run=workspace is saved to W&B: leave logger=wandb as it is.")
    if find_spec("wandb_workspaces") is None:
        raise ValueError("run=workspace needs a package that is not installed: pip install 'clipfix[workspace]'")
    if wandb_mode() != "online":
        raise ValueError("W&B is offline here, and run=workspace saves to it: `wandb login`, or set WANDB_API_KEY.")
    import wandb

    from clipfix.workspace import workspace

    to, watched = cfg.logger.wandb, list(cfg.eval.selection or ())
    if not (entity := to.entity or wandb.Api().default_entity):
        raise ValueError("W&B knows no default entity of yours: name a user or team, as in logger.wandb.entity=...")
    view = workspace(entity, to.project, list(cfg.eval.benchmarks), watched, cfg.eval.selection_metric)
    print(f"Workspace: {view.save().url}")


def prepare(cfg: DictConfig, folder: Path) -> None:
    """Make the shards of `data`, without training on them."""
    if cfg.data.prepare is None:
        choice = HydraConfig.get().runtime.choices["data"]
        raise ValueError(f"data={choice} has nothing to prepare, its data.prepare is null: try data=sharegpt4v")
    print(f"Shards are in {instantiate(cfg.data.prepare)()}")


def thresholds(cfg: DictConfig, folder: Path) -> None:
    """What the frozen reference of a method that mines says of the data, and the thresholds that follow from it."""
    if not hasattr(get_class(cfg.method._target_), "look"):
        choice = HydraConfig.get().runtime.choices["method"]
        raise ValueError(f"run=thresholds is for methods that mine positives. method={choice} does not: try method=fff")
    import torch

    from clipfix.mining.survey import survey

    method, data = method_and_data(cfg, start(cfg))
    survey(method.to("cuda" if torch.cuda.is_available() else "cpu"), data, folder, **cfg.survey)


def annotate(cfg: DictConfig, folder: Path) -> None:
    """Write the shards of `data.train` anew, with what a frozen model says of each sample."""
    from clipfix.annotate import annotate, plan, summarize

    settle(cfg)
    if cfg.data.prepare:
        instantiate(cfg.data.prepare)()
    settings: Any = OmegaConf.to_container(cfg.annotator, resolve=True)
    work = plan(cfg.data.train, cfg.annotator.output, settings, cfg.data.allow_pipe)
    if work.missing:
        # An annotator says in its own yaml how precisely it computes: the trainer's precision is that of training.
        alone: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = instantiate(cfg.trainer, _partial_=True, precision="32-true", **alone)
        annotate(instantiate(cfg.annotator), work, cfg.data.workers, trainer)
    summarize(work)


def export(cfg: DictConfig, folder: Path) -> None:
    """Write a model, repaired by a checkpoint or as it is, in the folders that other libraries load."""
    from clipfix import export as exporting
    from clipfix.export.about import about

    to = [cfg.export.to] if isinstance(cfg.export.to, str) else list(cfg.export.to)
    output = Path(cfg.export.output).expanduser()
    settings = {"to": to, "output": output, **{key: cfg.export[key] for key in ("dtype", "overwrite", "push_to")}}
    exporting.check(**settings)
    saved = read_checkpoint(cfg.checkpoint) if cfg.checkpoint else {}
    trained = OmegaConf.create(saved["config_yaml"]) if saved.get("config_yaml") else None
    words = HydraConfig.get().overrides.task
    asked_for = any(word.lstrip("+~").partition("=")[0].partition(".")[0] == "backbone" for word in words)
    chosen = cfg.backbone if trained is None or asked_for else trained.backbone  # a checkpoint knows its own
    settle(cfg)
    backbone = instantiate(chosen)
    if saved:
        load_repair(backbone, cfg.checkpoint)
    licences: Any = OmegaConf.to_container(OmegaConf.load(CONF / "licences.yaml"))
    repair = {key: value for key, value in origin(trained).items() if key != "backbone"}
    repair["step"] = saved.get("global_step")
    trained_on = trained.data.train if trained else None
    facts = about(backbone, chosen.pretrained, repair, trained_on, cfg.checkpoint, licences)
    facts["licence"] = cfg.export.licence or facts["licence"]
    for written in exporting.export(backbone, **settings, about=facts):
        print(f"Wrote {written}")


# Each verb with the groups that must be complete for it.
VERBS = {
    "fit": (fit, ("trainer", "callbacks", "logger", "data", "eval", "diffusion", "method", "backbone")),
    "eval": (score, ("trainer", "eval", "backbone")),
    "thresholds": (thresholds, ("data", "method", "backbone")),
    "annotate": (annotate, ("trainer", "data", "annotator", "diffusion", "backbone")),
    "prepare": (prepare, ()),  # not even data: its urls may still be open
    "compare": (compare, ("compare",)),
    "workspace": (workspace, ("logger",)),
    "export": (export, ("export",)),
}


def build(cfg: DictConfig) -> tuple[Any, dict[str, Any]]:
    """What every verb that scores starts from: the backbone, and those benchmarks whose data is there.

    Published data is looked for by its own settings: what is missing is named before torch is imported.
    """
    from clipfix.sets import present

    wanted = dict(cfg.eval.benchmarks)
    published = {name: instantiate(one.shards) for name, one in wanted.items() if OmegaConf.is_dict(one.get("shards"))}
    benchmarks = {name: instantiate(one) for name, one in present(wanted, published).items()}
    return start(cfg), benchmarks


def start(cfg: DictConfig) -> Any:
    """The backbone, in a settled process."""
    settle(cfg)
    return instantiate(cfg.backbone)


def settle(cfg: DictConfig) -> None:
    """A seeded process that warns of what matters."""
    import lightning as L

    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", harmless)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    L.seed_everything(cfg.seed, workers=True, verbose=False)


def method_and_data(cfg: DictConfig, backbone: Any) -> tuple[Any, Any]:
    """The method, and data that give what it reads and are there."""
    method = instantiate(cfg.method, backbone=backbone)
    if absent := [name for name in method.reads if not cfg.data.texts.get(name)]:
        raise ValueError(
            f"method={HydraConfig.get().runtime.choices['method']} reads data.texts.{absent[0]}, which data="
            f"{HydraConfig.get().runtime.choices['data']} does not give. Say where it lies in your shards, as in "
            f"'++data.texts.{absent[0]}={{key: {absent[0]}, pick: one, k: 1}}' (data/README.md), or choose a method."
        )
    if method.reads_features and cfg.data.features is None:
        raise ValueError(
            "method.reference is null, so its features are read from the shards: write them by run=annotate "
            "annotator=features (data/README.md) and set data.features=features.npz, or name a reference."
        )
    latents_of = method.latents_of if cfg.data.latents else None  # it reads every weight of an autoencoder
    if cfg.data.latents and latents_of is None:
        choice = HydraConfig.get().runtime.choices["method"]
        raise ValueError(f"method={choice} reads no stored latents: set data.latents=null.")
    data = instantiate(cfg.data, image_size=method.image_size, latents_of=latents_of)
    data.prepare_data()
    data.setup("fit")
    return method, data


def selection(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Callbacks that score the selection split and keep the best checkpoint by it, where there is such a split."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from clipfix.evals.selection import Selection

    if not cfg.eval.selection or cfg.data.selection is None:
        return {}
    metric = cfg.eval.selection_metric
    best = ModelCheckpoint(folder / "checkpoints", filename="best", monitor=f"selection/{metric}", mode="max")
    return {"selection": Selection(instantiate(cfg.eval.selection), metric), "best": best}


def origin(trained: DictConfig | None) -> dict[str, Any]:
    """What a result file says of the config: the backbone, and how its weights were repaired, if they were.

    By its `recipe`, the same for every seed and on every machine, `run=compare` tells groups apart.
    """
    by: dict[str, Any] = {"method": None, "control": None, "wise": None, "trained_with_seed": None, "recipe": None}
    if trained is not None:
        by["method"] = trained.method._target_.split(".")[-2]  # the module, named as its yaml is
        by |= {"control": trained.method.get("control"), "wise": trained.get("wise"), "trained_with_seed": trained.seed}
        elsewhere = ("seed", "root", "processes", "_target_", "_convert_", "_partial_")
        data = {key: trained.data[key] for key in ("batch_size", "texts", "prepare")}
        by["recipe"] = portable({"method": trained.method, "data": data, "wise": trained.get("wise")}, elsewhere)
    return {"backbone": HydraConfig.get().runtime.choices["backbone"], **by}


def config_and_choices(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config, and under `choices` what was chosen of each group: a method's config has not its name."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    choices = HydraConfig.get().runtime.choices
    return {"choices": {group: name for group, name in choices.items() if not group.startswith("hydra/")}} | config


def asked(cfg: DictConfig) -> dict[str, Any]:
    """How the benchmarks asked: `run=compare` refuses to set one scoring against another that asked otherwise."""
    return {"benchmarks": portable(cfg.eval.benchmarks)}


def portable(node: Any, leave_out: tuple[str, ...] = ()) -> Any:
    """Resolved config without some keys, and with paths inside the package as they are on every machine."""
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        return {key: portable(value, leave_out) for key, value in node.items() if key not in leave_out}
    if isinstance(node, list):
        return [portable(value, leave_out) for value in node]
    return node.replace(str(PACKAGE), PACKAGE.name) if isinstance(node, str) else node


def read_checkpoint(checkpoint: str) -> dict[str, Any]:
    """A checkpoint of `fit`; its tensors stay on disk until they are asked for."""
    import pickle

    import torch

    if not Path(checkpoint).is_file():
        raise ValueError(f"checkpoint={checkpoint} is not there: give the checkpoint of a run, outputs/.../best.ckpt.")
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError):
        saved = {}
    state = saved.get("state_dict", {})
    if "batches_seen" not in saved and not any(key.startswith("backbone.") for key in state):
        raise ValueError(
            f"checkpoint={checkpoint} is none of clipfix: give the weights of a whole model (DIVA's, Long-CLIP's, "
            "OpenAI's, open_clip's) as backbone.pretrained=/path/to/file, a folder as backbone.name=/path/to/folder."
        )
    return saved


def load_repair(backbone: Any, checkpoint: str) -> dict[str, Any]:
    """The backbone's trained weights from a checkpoint of `fit`, on top of those it was built with; gives the file."""
    saved = read_checkpoint(checkpoint)
    state = saved["state_dict"]
    prefix = "backbone."
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    positions = weights.get("model.text.positional_embedding")
    if positions is not None and positions.shape[1:] == backbone.text.positional_embedding.shape[1:]:
        backbone.set_positions(positions)  # Long-CLIP's table is longer than that of the backbone it came from
    try:
        unexpected = backbone.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} was trained on another backbone: {error}") from error
    if unexpected:
        raise ValueError(f"{checkpoint} was trained on another backbone: {unexpected[0]} is not in this one.")
    return saved


def checkpoint_to_resume(resume: str | None, folder: Path) -> str | None:
    """`auto` means the newest checkpoint of this run folder, which `run_folder` chose to continue."""
    if resume != "auto":
        return resume
    newest = folder / "checkpoints" / "last.ckpt"
    print(f"Resuming {newest}" if newest.exists() else "Nothing to resume: a new run starts.")
    return str(newest) if newest.exists() else None


# -- what yaml may ask for ---------------------------------------------------------------------------------------------


def run_folder(verb: str, name: str, resume: str | None) -> str:
    """A new folder under outputs/<name>, or the newest one that has a checkpoint when resume=auto."""
    if verb == "compare":
        name = verb  # of several methods and backbones
    started = sorted(Path("outputs", name).glob("*/checkpoints/last.ckpt"))
    if resume == "auto" and started:
        return str(started[-1].parents[1])
    return str(Path("outputs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S")))


def wandb_mode() -> str:
    """W&B goes online where somebody is logged in, and asks nobody anything elsewhere; WANDB_MODE has the last word."""
    import wandb

    return os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")


OmegaConf.register_new_resolver("package", lambda path: str(PACKAGE / path))
OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True)
OmegaConf.register_new_resolver("wandb_mode", wandb_mode, use_cache=True)


# -- the command line --------------------------------------------------------------------------------------------------


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        if cfg.run not in VERBS:
            raise ValueError(f"run={cfg.run} is no verb: choose from {', '.join(VERBS)}.")
        verb, groups = VERBS[cfg.run]
        if missing := list(unset(OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(groups))))):
            raise ValueError(f"Not set: {', '.join(missing)}. Give a value on the command line, as in {missing[0]}=...")
        verb(cfg, folder)
    except BaseException:
        close(folder, exit_code=1)
        raise
    close(folder, exit_code=0)


def close(folder: Path, exit_code: int) -> None:
    """Leaves nothing behind that the next run of a sweep would stumble over: no open W&B run, no empty folder."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=exit_code)
    with suppress(OSError):
        folder.rmdir()


def unset(node: Any, path: str = "") -> Iterator[str]:
    """Paths of the keys whose value is still ???."""
    if node == "???":
        yield path.removeprefix(".")
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from unset(value, f"{path}.{key}")


def main() -> None:
    """The command: one readable line for the user's mistakes, a traceback for ours."""
    sys.argv[1:] = named(sys.argv[1:])
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then hands errors on instead of printing them its own way
    try:
        run()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if verbose:
            raise
        sys.exit(f"clipfix: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where this was raised)")


def named(words: list[str]) -> list[str]:
    """Short words in those that hydra knows: `run=compare a.json b.json`, and `run=export to=timm output=folder`."""
    if "run=export" in words:
        short = ("to=", "output=", "overwrite=", "dtype=", "push_to=", "licence=")
        return [f"export.{word}" if word.startswith(short) else word for word in words]
    if "run=compare" not in words:
        return words
    files = [word for word in words if not word.startswith("-") and ("=" not in word or Path(word).exists())]
    if not files:
        return words
    quoted = ",".join("'" + file.replace("\\", "\\\\").replace("'", "\\'") + "'" for file in files)
    return [word for word in words if word not in files] + [f"compare.results=[{quoted}]"]


def explain(error: BaseException) -> str:
    """The error's own words, and for a mistyped key the keys that exist."""
    if "Original Traceback" in str(error):  # of a worker process: only its last line is for the user
        return str(error).strip().rpartition("\nValueError: ")[2]
    cause = error.__cause__
    if isinstance(cause, ValueError):  # hydra wraps what a constructor raised in its own text
        return str(cause)
    if not isinstance(cause, ConfigAttributeError) or cause.parent_node is None:
        return str(error).split("Config search path")[0].strip()
    wrong = str(cause.full_key)
    prefix = wrong.rpartition(".")[0]
    choices = [f"{prefix}.{key}".lstrip(".") for key in cause.parent_node if key != "hydra"]
    close = difflib.get_close_matches(wrong, choices, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"There is no {wrong}. {hint}Choices: {', '.join(choices)}."


if __name__ == "__main__":
    main()
