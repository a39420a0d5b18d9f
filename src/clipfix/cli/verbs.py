"""What a run may do, one function a verb: build from the config, work, leave something behind.

Heavy libraries are imported inside the verbs: `--help`, `--cfg job` and a mistyped key must answer at once.
"""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from clipfix import CONF
from clipfix.cli.resolvers import quiet_wandb, wandb_mode
from clipfix.cli.sweeps import in_sweep, judged, refuse_in_sweep
from clipfix.results import identity
from clipfix.system import ranks
from clipfix.system.secrets import without_secrets

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


def fit(cfg: DictConfig, folder: Path) -> float | None:
    """Score, train, score what the selection split prefers, report; a sweep that asks for it gets the score there."""
    started = time.perf_counter()
    backbone, benchmarks = build(cfg)
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from clipfix.results import provenance, report
    from clipfix.results.before_after import BeforeAfter
    from clipfix.training.checkpoints import checkpoint_to_resume, load_repair
    from clipfix.training.weight_averaging import WiSE

    rated = BeforeAfter(backbone, benchmarks)
    callbacks = dict(instantiate(cfg.callbacks)) | selection(cfg, folder) | {"before_after": rated}
    if cfg.wise is not None:
        callbacks["wise"] = WiSE(cfg.wise)
    if judged() and "best" not in callbacks:
        raise ValueError("A sweep by Optuna is judged by the selection split: set data.selection and eval.selection.")
    if "wandb" in cfg.logger:
        quiet_wandb()
    loggers = list(instantiate(cfg.logger).values())
    trainer = instantiate(cfg.trainer, callbacks=[c for c in callbacks.values() if c is not None], logger=loggers)
    refuse_in_sweep(trainer.strategy)

    method, data = method_and_data(cfg, backbone)  # missing shards are named before anything is scored
    method.config_yaml = OmegaConf.to_yaml(shareable(cfg))
    watched = callbacks["selection"].benchmarks.values() if "selection" in callbacks else ()
    chosen_by = [source for benchmark in watched for source in benchmark.sources().values()]
    seen = {"data.train": [data.train], "data.selection": [data.selection], "eval.selection": chosen_by}
    provenance.check_splits(benchmarks, seen)

    if trainer.is_global_zero:
        (folder / "config.yaml").write_text(method.config_yaml)
        report.describe(config_and_choices(cfg), loggers)
    try:
        trainer.fit(method, data, ckpt_path=checkpoint_to_resume(cfg.resume, folder), weights_only=True)
    except SIGTERMException:
        print(f"Asked to stop, and saved after step {trainer.global_step}: resume=auto goes on.")
        sys.exit(128 + signal.SIGTERM)  # Lightning's own code says that all went well

    last = folder / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(last)
    best = callbacks["best"].best_model_path if "best" in callbacks else ""
    # A run of no steps never asked which is best: it shows what a method changes at once.
    chosen = trainer.strategy.broadcast(best or str(last))
    step = load_repair(rated.backbone, chosen)["global_step"]
    rated.score("after", trainer)
    if trainer.is_global_zero:
        record = record_of(
            cfg, cfg, started, rated.scored, rated.facts, weights=rated.weights, step=step,
            checkpoint=os.path.relpath(chosen, folder), training_precision=cfg.trainer.precision,
        )  # fmt: skip
        finish(cfg, folder, rated.scored, benchmarks, record, loggers)
    return float(callbacks["best"].best_model_score) if judged() else None


def score(cfg: DictConfig, folder: Path) -> None:
    """Score the backbone, or a checkpoint of an earlier run, without training."""
    started = time.perf_counter()
    backbone, benchmarks = build(cfg)
    from lightning.fabric import Fabric

    from clipfix.evals.base import evaluate
    from clipfix.models.clip import weights_hash
    from clipfix.results import provenance
    from clipfix.training.checkpoints import load_repair

    if cfg.data.prepare and cfg.data.prepare.root in str(identity.asked(cfg)):  # a benchmark reads what it makes
        instantiate(cfg.data.prepare)()
    repair = load_repair(backbone, cfg.checkpoint) if cfg.checkpoint else {}
    fabric = Fabric(**{key: cfg.trainer[key] for key in ("accelerator", "devices", "num_nodes") if key in cfg.trainer})
    refuse_in_sweep(fabric.strategy)
    fabric.launch()
    scored = {"score": evaluate(backbone.to(fabric.device), benchmarks)}
    if fabric.is_global_zero:
        trained = OmegaConf.create(repair["config_yaml"]) if repair else None
        weights = {"score": weights_hash(backbone.model)}
        record = record_of(
            cfg, trained, started, scored, provenance.facts(backbone, benchmarks), weights=weights,
            checkpoint=cfg.checkpoint, step=repair.get("global_step"),
        )  # fmt: skip
        finish(cfg, folder, scored, benchmarks, record)
    fabric.barrier()  # who is done tidies the folder up, while it is empty


def compare(cfg: DictConfig, folder: Path) -> None:
    """Show the results of earlier runs side by side: a table, pictures and report.html. No model is loaded."""
    from clipfix.results.compare import compare
    from clipfix.results.compare.results import newest

    published: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    settings: Any = OmegaConf.to_container(cfg.compare)
    if not settings["results"] and len(last := newest(Path("outputs"), 2)) == 2:
        settings["results"] = [str(path) for path in last]
        print("The last two runs:", *(f"  {path.parent}" for path in last), sep="\n")
    pictures = compare(folder, cfg.seed, published, **settings)
    if cfg.logger.get("wandb"):  # Lightning and W&B take seconds to import: after the table is read
        from clipfix.results import report

        quiet_wandb()
        logger = instantiate(cfg.logger.wandb, name="compare", group="compare")
        report.describe({"compare": settings}, [logger])
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

    from clipfix.results.workspace import workspace

    to, watched = cfg.logger.wandb, list(cfg.eval.selection or ())
    if not (entity := to.entity or wandb.Api().default_entity):
        raise ValueError("W&B knows no default entity of yours: name a user or team, as in logger.wandb.entity=...")
    view = workspace(entity, to.project, list(cfg.eval.benchmarks), watched, cfg.eval.selection_metric)
    print(f"Workspace: {view.save().url}")


def prepare(cfg: DictConfig, folder: Path) -> None:
    """Make the shards of `data`, without training on them."""
    if cfg.data.prepare is None:
        raise ValueError(f"data={choice('data')} has nothing to prepare, its data.prepare is null: try data=sharegpt4v")
    print(f"Shards are in {instantiate(cfg.data.prepare)()}")


def thresholds(cfg: DictConfig, folder: Path) -> None:
    """What the frozen reference of a method that mines says of the data, and the thresholds that follow from it."""
    if not hasattr(get_class(cfg.method._target_), "look"):
        raise ValueError(
            f"run=thresholds is for methods that mine positives. method={choice('method')} does not: try method=fff"
        )
    import torch

    from clipfix.annotate.survey import survey

    method, data = method_and_data(cfg, start(cfg))
    survey(method.to("cuda" if torch.cuda.is_available() else "cpu"), data, folder, **cfg.survey)


def annotate(cfg: DictConfig, folder: Path) -> None:
    """Write the shards of `data.train` anew, with what a frozen model says of each sample."""
    from clipfix.annotate import annotate, plan, summarize

    settle(cfg)
    if cfg.data.prepare:
        instantiate(cfg.data.prepare)()
    work = plan(cfg.data.train, cfg.annotator.output, shareable(cfg.annotator), cfg.data.allow_pipe)
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
    from clipfix.training.checkpoints import load_repair, read_checkpoint

    to = [cfg.export.to] if isinstance(cfg.export.to, str) else list(cfg.export.to or ())
    if cfg.export.output is None:
        raise ValueError("export.output=null says no place: give a folder, or leave it out for one in outputs/.")
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
    repair = identity.repair(trained) | {"step": saved.get("global_step")}
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
    from clipfix.data.sets import present

    check_report(cfg)
    wanted = dict(cfg.eval.benchmarks)
    published = {name: instantiate(one.shards) for name, one in wanted.items() if OmegaConf.is_dict(one.get("shards"))}
    benchmarks = {name: instantiate(one) for name, one in present(wanted, published).items()}
    return start(cfg), benchmarks


def start(cfg: DictConfig) -> Any:
    """The backbone, in a settled process."""
    settle(cfg)
    return instantiate(cfg.backbone)


def settle(cfg: DictConfig) -> None:
    """A seeded process that warns of what matters, for a config whose values are of the types asked for."""
    import lightning as L

    from clipfix.cli.arguments import check_arguments

    groups = [group for group in VERBS[cfg.run][1] if OmegaConf.is_dict(cfg[group])]
    check_arguments({group: resolved(cfg[group]) for group in groups}, groups)
    if "trainer" in groups:
        ranks.check(cfg.trainer.get("devices"), cfg.trainer.get("num_nodes", 1))
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", harmless)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    L.seed_everything(cfg.seed, workers=True, verbose=False)


def resolved(group: DictConfig) -> dict[str, Any]:
    """Without keys that point at nothing, as data.selection does where data.prepare is null: who reads them says so."""
    found = {}
    for key in group:
        with suppress(InterpolationResolutionError):
            value = group[key]
            found[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return found


def method_and_data(cfg: DictConfig, backbone: Any) -> tuple[Any, Any]:
    """The method, and data that give what it reads and are there."""
    method = instantiate(cfg.method, backbone=backbone)
    try:
        method.configure_optimizers()
    except Exception as error:  # torch raises whatever its arithmetic meets
        raise ValueError(f"method.optimizer: {error}") from error
    data = instantiate(cfg.data, _partial_=True)(needs=method.needs)  # hydra would make a config of a dataclass
    data.prepare_data()
    data.setup("fit")
    return method, data


def selection(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Callbacks that score the selection split and keep the best checkpoint by it, where there is such a split."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from clipfix.results.selection import Selection

    if not cfg.eval.selection or cfg.data.selection is None:
        return {}
    metric = cfg.eval.selection_metric
    best = ModelCheckpoint(folder / "checkpoints", filename="best", monitor=f"selection/{metric}", mode="max")
    return {"selection": Selection(instantiate(cfg.eval.selection), metric), "best": best}


def finish(
    cfg: DictConfig,
    folder: Path,
    scored: Mapping[str, Any],
    benchmarks: Mapping[str, Any],
    record: Any,
    loggers: Any = (),
) -> None:
    """Write what the run leaves behind, and print its scores, the files to open and the next command to try."""
    from clipfix.results import report

    about = (cfg.eval.selection_metric or "").partition("/")[0]
    intervals = {key: cfg.compare[key] for key in ("resamples", "coverage")}
    report.write(folder, scored, benchmarks, record, loggers, first=about, **intervals, **cfg.report)
    if not in_sweep():
        print(*report.next_command(folder, record), sep="\n")


def check_report(cfg: DictConfig) -> None:
    """Refuse values of `report` that a run would stumble over at its end."""
    if cfg.report.table not in (tables := ("headlines", "full")):
        raise ValueError(f"report.table={cfg.report.table}: choose from {', '.join(tables)}.")
    if not isinstance(cfg.report.pictures, bool):
        raise ValueError(f"report.pictures={cfg.report.pictures}: set true or false.")


def record_of(
    cfg: DictConfig,
    trained: Any,
    started: float,
    scored: Mapping[str, Mapping[str, Any]],
    facts: dict[str, Any],
    *,
    weights: Mapping[str, str],
    checkpoint: str | None,
    step: int | None,
    training_precision: str | None = None,
) -> Any:
    """Return the record of a run.

    Args:
        trained: The config of the training that repaired the backbone; None of a backbone as it was.
        started: `time.perf_counter()` at the start of the run.
        scored: {column: {benchmark: Scores}}.
        facts: What `provenance.facts` returned.
    """
    from clipfix.evals.base import percentages
    from clipfix.results.record import Record
    from clipfix.training.callbacks import peak_memory_gb

    training = {"training": training_precision} if training_precision else {}
    return Record(
        **facts,
        **identity.repair(trained),
        **identity.asked(cfg),
        backbone=choice("backbone"),
        weights=weights,
        precision={"scores": "fp32", **training},
        checkpoint=checkpoint,
        step=step,
        seed=cfg.seed,
        seconds=time.perf_counter() - started,
        peak_memory_gb=round(peak_memory_gb(), 2),
        scores={column: percentages(one) for column, one in scored.items()},
    )


def choice(group: str) -> str:
    """What was chosen of a group of the config."""
    return HydraConfig.get().runtime.choices[group]


def config_and_choices(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config, and under `choices` what was chosen of each group: a method's config has not its name."""
    choices = HydraConfig.get().runtime.choices
    chosen = {group: name for group, name in choices.items() if not group.startswith("hydra/")}
    return {"choices": chosen} | shareable(cfg)


def shareable(node: DictConfig) -> dict[str, Any]:
    """Config as a run keeps and tells it: every value as it was meant, but for secrets."""
    return without_secrets(OmegaConf.to_container(node, resolve=True))
