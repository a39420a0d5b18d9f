"""The verbs of `run=...`, one function each: build from the config, work, leave something behind.

Heavy libraries are imported inside the verbs: `--help`, `--cfg job` and a mistyped key must answer at once.
"""

import copy
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from clipfix import CONF
from clipfix.cli.resolvers import quiet_wandb, wandb_mode
from clipfix.cli.run import Run, shareable
from clipfix.cli.sweeps import judged, refuse_in_sweep
from clipfix.results import identity


def fit(run: Run) -> float | None:
    """Score, train, score the checkpoint that the selection split prefers, report.

    Return its selection score to a sweep that is judged by it.
    """
    run.check_report()
    benchmarks, backbone = run.benchmarks, run.backbone  # in this order: missing data is named before torch is imported
    from clipfix.results.before_after import BeforeAfter
    from clipfix.training.checkpoints import load_repair

    original = copy.deepcopy(backbone)  # a method may rebuild its own (Long-CLIP, LoRA)
    scorer = BeforeAfter(run.method.wrap(original), benchmarks)
    callbacks = callbacks_of(run, scorer)
    trainer = instantiate(
        run.config.trainer, callbacks=[one for one in callbacks.values() if one is not None], logger=run.loggers
    )
    refuse_in_sweep(trainer.strategy)
    chosen = train(run, trainer, callbacks)
    step = load_repair(scorer.model, chosen)["global_step"]
    scorer.score("after", trainer)
    if trainer.is_global_zero:
        run.finish(
            scorer.scored, scorer.facts, run.config, weights=scorer.weights, step=step, loggers=run.loggers,
            checkpoint=os.path.relpath(chosen, run.folder),
            precision={"scores": "fp32", "training": run.config.trainer.precision},
        )  # fmt: skip
    return float(callbacks["best"].best_model_score) if judged() else None


def callbacks_of(run: Run, scorer: Any) -> dict[str, Any]:
    """Return the callbacks of a fit by name: the config's, selection and its best checkpoint, `scorer`, WiSE."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from clipfix.results.selection import Selection
    from clipfix.training.weight_averaging import WiSE

    cfg = run.config
    callbacks = dict(instantiate(cfg.callbacks))
    if cfg.eval.selection and cfg.data.selection is not None:
        metric = cfg.eval.selection_metric
        callbacks["selection"] = Selection(instantiate(cfg.eval.selection), metric)
        callbacks["best"] = ModelCheckpoint(
            run.folder / "checkpoints", filename="best", monitor=f"selection/{metric}", mode="max"
        )
    elif judged():
        raise ValueError("A sweep by Optuna is judged by the selection split: set data.selection and eval.selection.")
    callbacks["before_after"] = scorer
    if cfg.wise is not None:
        callbacks["wise"] = WiSE(cfg.wise)
    if "stopped" in callbacks:  # it saves what the other callbacks hold, so it is called last
        callbacks["stopped"] = callbacks.pop("stopped")
    return callbacks


def train(run: Run, trainer: Any, callbacks: dict[str, Any]) -> str:
    """Train, and return the checkpoint to score: the best by the selection split, or else the last."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from clipfix.results import provenance, report
    from clipfix.training.checkpoints import checkpoint_to_resume

    method, data = run.method, run.data  # missing shards are named before anything is scored
    method.config_yaml = OmegaConf.to_yaml(shareable(run.config))
    watched = callbacks["selection"].benchmarks.values() if "selection" in callbacks else ()
    chosen_by = [source for benchmark in watched for source in benchmark.sources().values()]
    seen = {"data.train": [data.train], "data.selection": [data.selection], "eval.selection": chosen_by}
    provenance.check_splits(run.benchmarks, seen)
    if trainer.is_global_zero:
        (run.folder / "config.yaml").write_text(method.config_yaml)
        report.describe(run.config_and_choices(), run.loggers)
    try:
        resumed = checkpoint_to_resume(run.config.resume, run.folder)
        trainer.fit(method, data, ckpt_path=resumed, weights_only=True)
    except SIGTERMException:
        print(f"Asked to stop, and saved after step {trainer.global_step}: resume=auto goes on.")
        sys.exit(128 + signal.SIGTERM)  # Lightning's own code says that all went well
    last = run.folder / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(last)
    # With `method.steps=0` there is no best checkpoint; the last one is scored.
    best = callbacks["best"].best_model_path if "best" in callbacks else ""
    return trainer.strategy.broadcast(best or str(last))


def score(run: Run) -> None:
    """Score the backbone, or a checkpoint of an earlier run, without training."""
    run.check_report()
    benchmarks, backbone, cfg = run.benchmarks, run.backbone, run.config
    from lightning.fabric import Fabric

    from clipfix.evals.base import evaluate
    from clipfix.models.clip import weights_hash
    from clipfix.results import provenance
    from clipfix.training.checkpoints import load_repair, read_checkpoint

    if cfg.data.get("prepare") and cfg.data.prepare.root in str(identity.asked(cfg)):  # a benchmark reads what it makes
        instantiate(cfg.data.prepare)()
    saved = read_checkpoint(cfg.checkpoint) if cfg.checkpoint else {}
    trained: Any = identity.stored(saved.get("config_yaml"))
    model = wrapped(backbone, trained) if trained else backbone
    if saved:
        load_repair(model, cfg.checkpoint)
    fabric = Fabric(**{key: cfg.trainer[key] for key in ("accelerator", "devices", "num_nodes") if key in cfg.trainer})
    refuse_in_sweep(fabric.strategy)
    fabric.launch()
    scored = {"score": evaluate(model.to(fabric.device), benchmarks)}
    if fabric.is_global_zero:
        run.finish(
            scored, provenance.facts(backbone, benchmarks), trained, step=saved.get("global_step"),
            weights={"score": weights_hash(model.weights)}, checkpoint=cfg.checkpoint, precision={"scores": "fp32"},
        )  # fmt: skip
    fabric.barrier()  # a rank that is done removes the folder while it is empty


def wrapped(backbone: Any, trained: Any) -> Any:
    """Return the model that the method of an earlier run scores, around a backbone, before its weights are loaded."""
    from clipfix.methods.base import Method

    method: Any = get_class(trained.method._target_)
    if method.wrap is Method.wrap:  # as most have it: no generator is loaded for nothing
        return backbone
    return instantiate(trained.method, backbone=backbone).wrap(backbone)


def compare(run: Run) -> None:
    """Show the results of earlier runs side by side: a table, pictures and report.html. No model is loaded."""
    from clipfix.results.compare import compare
    from clipfix.results.compare.results import newest

    published: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    settings: Any = OmegaConf.to_container(run.config.compare)
    if not settings["results"] and len(last := newest(Path("outputs"), 2)) == 2:
        settings["results"] = [str(path) for path in last]
        print("The last two runs:", *(f"  {path.parent}" for path in last), sep="\n")
    pictures = compare(run.folder, run.config.seed, published, **settings)
    if run.config.logger.get("wandb"):  # Lightning and W&B take seconds to import: after the table is read
        from clipfix.results import report

        quiet_wandb()
        logger = instantiate(run.config.logger.wandb, name="compare", group="compare")
        report.describe({"compare": settings}, [logger])
        for path in pictures:
            report.show(f"compare/{path.stem}", path, [logger])


def workspace(run: Run) -> None:
    """Save the W&B workspace that results/workspace.py defines, for the benchmarks of `eval`, as a new view."""
    cfg = run.config
    if "wandb" not in cfg.logger:
        raise ValueError("run=workspace is saved to W&B: leave logger=wandb as it is.")
    if find_spec("wandb_workspaces") is None:
        raise ValueError("run=workspace needs a package that is not installed: pip install 'clipfix[workspace]'")
    if wandb_mode() != "online":
        raise ValueError("W&B is offline here, and run=workspace saves to it: `wandb login`, or set WANDB_API_KEY.")
    import wandb

    from clipfix.results.workspace import logged_here, workspace

    to, watched = cfg.logger.wandb, list(cfg.eval.selection or ())
    if not (entity := to.entity or wandb.Api().default_entity):
        raise ValueError("W&B knows no default entity of yours: name a user or team, as in logger.wandb.entity=...")
    logged = logged_here(Path("outputs"))
    view = workspace(entity, to.project, list(cfg.eval.benchmarks), watched, cfg.eval.selection_metric, logged)
    print(f"Workspace: {view.save().url}")


def prepare(run: Run) -> None:
    """Make the shards of `data`, without training on them."""
    prepare, choice = run.config.data.prepare, run.choices["data"]
    if prepare is None:
        raise ValueError(f"data={choice} has nothing to prepare, its data.prepare is null: try data=sharegpt4v")
    print(f"Shards are in {instantiate(prepare)()}")


def thresholds(run: Run) -> None:
    """Survey the data by the frozen reference of a method that mines positives, and suggest thresholds."""
    if "mining" not in run.config.method:
        raise ValueError(
            "run=thresholds is for methods that mine positives. "
            f"method={run.choices['method']} does not: try method=fff"
        )
    import torch

    from clipfix.annotate.survey import survey

    method, data = run.method, run.data
    survey(method.to("cuda" if torch.cuda.is_available() else "cpu"), data, run.folder, **run.config.survey)


def annotate(run: Run) -> None:
    """Write the shards of `data.train` anew, with what a frozen model says of each sample."""
    from clipfix.annotate import annotate, plan, summarize

    run.seed_and_check()
    cfg = run.config
    if cfg.data.prepare:
        instantiate(cfg.data.prepare)()
    work = plan(cfg.data.train, cfg.annotator.output, shareable(cfg.annotator), cfg.data.allow_pipe)
    if work.missing:
        # An annotator says in its own yaml how precisely it computes: the trainer's precision is that of training.
        alone: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = instantiate(cfg.trainer, _partial_=True, precision="32-true", **alone)
        annotate(instantiate(cfg.annotator), work, cfg.data.workers, trainer)
    summarize(work)


def export(run: Run) -> None:
    """Write a model, repaired by a checkpoint or as it is, in the folders that other libraries load."""
    from clipfix import export as exporting
    from clipfix.export.about import about
    from clipfix.training.checkpoints import load_repair, read_checkpoint

    cfg = run.config
    to = [cfg.export.to] if isinstance(cfg.export.to, str) else list(cfg.export.to or ())
    if cfg.export.output is None:
        raise ValueError("export.output=null says no place: give a folder, or leave it out for one in outputs/.")
    output = Path(cfg.export.output).expanduser()
    settings = {"to": to, "output": output, **{key: cfg.export[key] for key in ("dtype", "overwrite", "push_to")}}
    exporting.check(**settings)
    saved = read_checkpoint(cfg.checkpoint) if cfg.checkpoint else {}
    trained = identity.stored(saved.get("config_yaml"))
    named = any(word.lstrip("+~").partition("=")[0].partition(".")[0] == "backbone" for word in run.words)
    chosen = cfg.backbone if trained is None or named else trained.backbone
    run.seed_and_check()
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
