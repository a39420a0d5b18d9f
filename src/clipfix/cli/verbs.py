"""The verbs of `run=...`, one function each.

Heavy libraries are imported inside the verbs, so that `--help`, `--cfg job` and a mistyped key are answered at once.
"""

import copy
import os
import signal
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from clipfix import CONF
from clipfix.cli.resolvers import quiet_wandb, wandb_mode
from clipfix.cli.run import Run, shareable
from clipfix.cli.stored import stored_config
from clipfix.cli.sweeps import check_one_process, is_optuna_trial
from clipfix.results import identity

# -- fit ---------------------------------------------------------------------------------------------------------------


def fit(run: Run) -> float | None:
    """Score the backbone, train it, score the selected checkpoint, and write the report.

    Return the selection score of that checkpoint in a trial of Optuna, else None.
    """
    benchmarks, backbone = run.benchmarks, run.backbone  # in this order: missing data is reported before torch loads
    from clipfix.results.before_after import BeforeAfter
    from clipfix.training.checkpoints import load_repair

    original = copy.deepcopy(backbone)  # a method may rebuild the backbone (Long-CLIP, LoRA)
    scorer = BeforeAfter(run.method.wrap(original), benchmarks)
    callbacks = fit_callbacks(run, scorer)
    trainer = instantiate(run.config.trainer, callbacks=list(callbacks.values()), logger=run.loggers)
    check_one_process(trainer.strategy)
    selected = train(run, trainer, callbacks)
    step = load_repair(scorer.model, selected)["global_step"]
    scorer.score("after", trainer)
    if trainer.is_global_zero:
        run.finish(
            scorer.scored, scorer.facts, run.config, weights=scorer.weights, step=step, loggers=run.loggers,
            checkpoint=os.path.relpath(selected, run.folder),
            precision={"scores": "fp32", "training": run.config.trainer.precision},
        )  # fmt: skip
    return float(callbacks["best"].best_model_score) if is_optuna_trial() else None


def fit_callbacks(run: Run, scorer: Any) -> dict[str, Any]:
    """Return the callbacks of a fit by name: those of the config, selection, best checkpoint, scorer and WiSE."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from clipfix.results.selection import Selection
    from clipfix.training.weight_averaging import WiSE

    cfg = run.config
    callbacks = {name: callback for name, callback in instantiate(cfg.callbacks).items() if callback is not None}
    if cfg.eval.selection and cfg.data.selection is not None:
        metric = cfg.eval.selection_metric
        callbacks["selection"] = Selection(instantiate(cfg.eval.selection), metric)
        callbacks["best"] = ModelCheckpoint(
            run.folder / "checkpoints", filename="best", monitor=f"selection/{metric}", mode="max"
        )
    elif is_optuna_trial():
        raise ValueError("Optuna optimizes the score on the selection split: set data.selection and eval.selection.")
    callbacks["before_after"] = scorer
    if cfg.wise is not None:
        callbacks["wise"] = WiSE(cfg.wise)
    if "stopped" in callbacks:  # it must be last, because it saves the state of the other callbacks
        callbacks["stopped"] = callbacks.pop("stopped")
    return callbacks


def train(run: Run, trainer: Any, callbacks: Mapping[str, Any]) -> str:
    """Train, and return the path of the checkpoint to score: the best on the selection split, else the last."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from clipfix.results import report
    from clipfix.training.checkpoints import checkpoint_to_resume

    method, data = run.method, run.data  # missing shards are reported before anything is scored
    method.config_yaml = OmegaConf.to_yaml(shareable(run.config))
    check_splits(run, callbacks)
    if trainer.is_global_zero:
        (run.folder / "config.yaml").write_text(method.config_yaml)
        report.log_config(run.config_and_choices(), run.loggers)
    try:
        resumed = checkpoint_to_resume(run.config.resume, run.folder)
        if resumed is not None:
            check_same_method(resumed, run.config)
        trainer.fit(method, data, ckpt_path=resumed, weights_only=True)
    except SIGTERMException:
        print(f"Stopped by a signal and saved after step {trainer.global_step}. Set resume=auto to continue.")
        sys.exit(128 + signal.SIGTERM)  # Lightning would exit with 0, which means success
    last = run.folder / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(last)
    # With `method.steps=0` there is no best checkpoint; the last one is scored.
    best = callbacks["best"].best_model_path if "best" in callbacks else ""
    return trainer.strategy.broadcast(best or str(last))


def check_same_method(checkpoint: str, config: Any) -> None:
    """Raise ValueError if a checkpoint to resume from was written by another method, or with another control."""
    from clipfix.training.checkpoints import read_checkpoint

    stored: Any = stored_config(read_checkpoint(checkpoint, "resume"), checkpoint, config)
    if stored is None:
        return
    theirs, ours = identity.repair(stored), identity.repair(config)
    for key in ("method", "control"):
        if theirs[key] != ours[key]:
            raise ValueError(
                f"resume={checkpoint} was written by a run with {key} {theirs[key]}, and this one has {ours[key]}: set "
                "what its config.yaml says, or start a new run from its weights (run=export to=open_clip, then "
                "backbone=folder)."
            )


def check_splits(run: Run, callbacks: Mapping[str, Any]) -> None:
    """Raise an error if a benchmark reads files that the run trains on or selects its checkpoint by."""
    from clipfix.results import provenance

    selection = callbacks["selection"].benchmarks.values() if "selection" in callbacks else ()
    sources = [source for benchmark in selection for source in benchmark.sources().values()]
    seen = {"data.train": [run.data.train], "data.selection": [run.data.selection], "eval.selection": sources}
    provenance.check_splits(run.benchmarks, seen)


# -- eval --------------------------------------------------------------------------------------------------------------


def score(run: Run) -> None:
    """Score the backbone, or a checkpoint of an earlier run, without training."""
    benchmarks, backbone, cfg = run.benchmarks, run.backbone, run.config
    from lightning.fabric import Fabric

    from clipfix.evals.base import evaluate
    from clipfix.models.clip import weights_hash
    from clipfix.results import provenance

    if cfg.data.get("prepare") and cfg.data.prepare.root in str(identity.asked(cfg)):  # a benchmark reads these shards
        instantiate(cfg.data.prepare)()
    model, trained, step = load_model(backbone, cfg)
    fabric = Fabric(**{key: cfg.trainer[key] for key in ("accelerator", "devices", "num_nodes") if key in cfg.trainer})
    check_one_process(fabric.strategy)
    fabric.launch()
    scored = {"score": evaluate(model.to(fabric.device), benchmarks)}
    if fabric.is_global_zero:
        run.finish(
            scored, provenance.facts(backbone, benchmarks), trained, step=step,
            weights={"score": weights_hash(model.weights)}, checkpoint=cfg.checkpoint, precision={"scores": "fp32"},
        )  # fmt: skip
    fabric.barrier()  # a rank that finishes removes the run folder if it is empty


def load_model(backbone: Any, cfg: Any) -> tuple[Any, Any, int | None]:
    """Return the model to score, the config of its training and its training step; the latter two None if untrained."""
    from clipfix.training.checkpoints import load_repair, read_checkpoint

    if not cfg.checkpoint:
        return backbone, None, None
    trained = stored_config(read_checkpoint(cfg.checkpoint), cfg.checkpoint, cfg)
    model = wrap(backbone, trained.method) if trained else backbone
    return model, trained, load_repair(model, cfg.checkpoint).get("global_step")


def wrap(backbone: Any, method_config: Any) -> Any:
    """Return the model that a method scores, built from the config of that method. Its weights are not loaded."""
    from clipfix.methods.base import Method

    method: Any = get_class(method_config._target_)
    if method.wrap is Method.wrap:  # the default needs no method object, which would load a diffusion model for DIVA
        return backbone
    return instantiate(method_config, backbone=backbone).wrap(backbone)


# -- results of earlier runs -------------------------------------------------------------------------------------------


def compare(run: Run) -> None:
    """Compare the results of earlier runs: print a table, write figures and report.html. No model is loaded."""
    from clipfix.results.compare import compare
    from clipfix.results.compare.results import newest

    published: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    settings: Any = OmegaConf.to_container(run.config.compare)
    if not settings["results"] and len(last := newest(Path("outputs"), 2)) == 2:
        settings["results"] = [str(path) for path in last]
        print("The last two runs:", *(f"  {path.parent}" for path in last), sep="\n")
    pictures = compare(run.folder, run.config.seed, published, **settings)
    if run.config.logger.get("wandb"):  # after the table is printed, because Lightning and W&B take seconds to import
        from clipfix.results import report

        quiet_wandb()
        logger = instantiate(run.config.logger.wandb, name="compare", group="compare")
        report.log_config({"compare": settings}, [logger])
        for path in pictures:
            report.log_picture(f"compare/{path.stem}", path, [logger])


def workspace(run: Run) -> None:
    """Save the W&B workspace of results/workspace.py, for the benchmarks of `eval`, as a new view."""
    cfg = run.config
    if "wandb" not in cfg.logger:
        raise ValueError("run=workspace saves to W&B: set logger=wandb.")
    if find_spec("wandb_workspaces") is None:
        raise ValueError("run=workspace needs a package that is not installed: pip install 'clipfix[workspace]'")
    if wandb_mode() != "online":
        raise ValueError("run=workspace needs W&B online: run `wandb login` or set WANDB_API_KEY.")
    import wandb

    from clipfix.results.workspace import logged_here, workspace

    project, selection = cfg.logger.wandb, list(cfg.eval.selection or ())
    if not (entity := project.entity or wandb.Api().default_entity):
        raise ValueError("logger.wandb.entity is null and W&B has no default entity for you: set a user or a team.")
    logged = logged_here(Path("outputs"))
    view = workspace(entity, project.project, list(cfg.eval.benchmarks), selection, cfg.eval.selection_metric, logged)
    print(f"Workspace: {view.save().url}")


# -- data --------------------------------------------------------------------------------------------------------------


def prepare(run: Run) -> None:
    """Make the shards of `data` without training."""
    prepare, choice = run.config.data.prepare, run.choices["data"]
    if prepare is None:
        raise ValueError(f"data={choice} has no data.prepare: choose a data set that is prepared, as data=sharegpt4v.")
    print(f"Shards are in {instantiate(prepare)()}")


def thresholds(run: Run) -> None:
    """Survey the data with the reference model of a method that mines positives, and suggest thresholds."""
    if "mining" not in run.config.method:
        raise ValueError(
            f"run=thresholds needs a method that mines positives, and method={run.choices['method']} does not: "
            "set method=fff."
        )
    import torch

    from clipfix.annotate.survey import survey

    method, data = run.method, run.data
    survey(method.to("cuda" if torch.cuda.is_available() else "cpu"), data, run.folder, **run.config.survey)


def annotate(run: Run) -> None:
    """Write copies of the shards of `data.train` to which a frozen model has added annotations."""
    from clipfix.annotate import annotate, plan, summarize

    run.seed_and_check()
    cfg = run.config
    if cfg.data.prepare:
        instantiate(cfg.data.prepare)()
    work = plan(cfg.data.train, cfg.annotator.output, shareable(cfg.annotator), cfg.data.allow_pipe)
    if work.missing:
        # `trainer.precision` is for training; the annotator's own config sets the precision of annotations.
        overrides: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = instantiate(cfg.trainer, _partial_=True, precision="32-true", **overrides)
        annotate(instantiate(cfg.annotator), work, cfg.data.workers, trainer)
    summarize(work)


# -- export ------------------------------------------------------------------------------------------------------------


def export(run: Run) -> None:
    """Write a model, with or without a checkpoint of an earlier run, in the formats of other libraries."""
    from clipfix import export as exporting
    from clipfix.export.about import about
    from clipfix.training.checkpoints import load_repair, read_checkpoint

    cfg = run.config
    settings = export_settings(cfg.export)
    exporting.check(**settings)
    saved = read_checkpoint(cfg.checkpoint) if cfg.checkpoint else {}
    trained = stored_config(saved, cfg.checkpoint, cfg)
    backbone_config = cfg.backbone if trained is None or overrides_group(run, "backbone") else trained.backbone
    run.seed_and_check()
    backbone = instantiate(backbone_config)
    if saved:
        load_repair(backbone, cfg.checkpoint)
    licences: Any = OmegaConf.to_container(OmegaConf.load(CONF / "licences.yaml"))
    repair = identity.repair(trained) | {"step": saved.get("global_step")}
    trained_on = trained.data.train if trained else None
    facts = about(backbone, backbone_config.pretrained, repair, trained_on, cfg.checkpoint, licences)
    card: Any = OmegaConf.to_container(cfg.export)
    for key in ("licence", "base_model", "datasets"):
        facts[key] = card[key] or facts[key]
    facts["language"] = card["language"]
    for written in exporting.export(backbone, **settings, about=facts):
        print(f"Wrote {written}")


def export_settings(cfg: Any) -> dict[str, Any]:
    """Return the arguments that `export.check` and `export.export` share, from the config group `export`."""
    if cfg.output is None:
        raise ValueError("export.output is null: set a folder, or leave the key out for a folder in outputs/.")
    return {
        "to": [cfg.to] if isinstance(cfg.to, str) else list(cfg.to or ()),
        "output": Path(cfg.output).expanduser(),
        **{key: cfg[key] for key in ("dtype", "overwrite", "push_to")},
    }


def overrides_group(run: Run, group: str) -> bool:
    """Return whether the command line chooses an option of a config group or sets a key in it."""
    return any(one.lstrip("+~").partition("=")[0].partition(".")[0] == group for one in run.overrides)


# Each verb with the config groups in which no value may be ???.
VERBS = {
    "fit": (fit, ("trainer", "callbacks", "logger", "data", "eval", "diffusion", "method", "backbone")),
    "eval": (score, ("trainer", "eval", "backbone")),
    "thresholds": (thresholds, ("data", "method", "backbone")),
    "annotate": (annotate, ("trainer", "data", "annotator", "diffusion", "backbone")),
    "prepare": (prepare, ()),  # without `data`: data.train may not be set yet
    "compare": (compare, ("compare",)),
    "workspace": (workspace, ("logger",)),
    "export": (export, ("export",)),
}
