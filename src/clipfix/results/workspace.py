"""The W&B workspace: one section per metric prefix, runs grouped by method and backbone."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

# Keys that `report.log_config` writes into the config of each run.
GROUPED_BY = ("choices.method", "choices.backbone")
PICTURE = "/grid"  # the end of the name of every picture
MEDIA = re.compile(r"_\d+_[0-9a-f]+\.png$")  # step and hash, which W&B appends to the name of the file
STEP = "trainer/global_step"  # optimizer steps; Lightning logs them with every value
# The runs of a group differ by seed: show their mean and standard deviation.
OVER_SEEDS: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}


def workspace(
    entity: str,
    project: str,
    scored: Sequence[str],
    watched: Sequence[str],
    selected_by: str | None,
    logged: Iterable[str] = (),
) -> ws.Workspace:
    """Return the workspace of a project.

    Args:
        entity: A user or a team.
        project: Name of the project.
        scored: Names of the benchmarks that score a run before and after training.
        watched: Names of the benchmarks on the selection split.
        selected_by: The metric by which the checkpoint is selected.
        logged: Names that earlier runs logged. A prefix without a section below gets one, so that the notes of a new
            method are shown without an edit here. Names that end in `/grid` are pictures.
    """
    sections: dict[str, list[Any]] = {
        "selection": [
            *([lines(selected_by, f"selection/{selected_by}")] if selected_by else []),
            *(every(name, f"^selection/{name}/") for name in watched),
        ],
        # Each run has two points: before training, at step 0, and after it.
        "eval": [every("means", "^eval/[^/]+/mean$"), *(every(name, f"^eval/{name}/") for name in scored)],
        "report": [
            wr.WeavePanelSummaryTable(table_name="report/before_after"),
            *(pictures(name, f"report/{name}") for name in ("scores", "scores_all", "curves")),
            pictures("examples", *(f"report/{name}" for name in scored)),
        ],
        "compare": [pictures(name, f"compare/{name}") for name in ("radar", "forgetting", "lengths", "examples")],
        "train": [lines("loss", "train/loss", "val/loss"), every("terms of the loss", "^train/")],
        "val": [every("terms of the loss, held out", "^val/[a-z]+$"), every("by timestep", "^val/t[0-9]+_")],
        "denoising": [every("loss under each condition", "^denoising/")],
        "drift": [every("distance from the original model", "^drift/")],
        "positives": [
            every("promoted per image", "^positives/.*_per_image$"),
            every("promoted, percent", "^positives/.*_percent$"),
        ],
        "promoted": [pictures("promoted pairs", "promoted/grid")],
        "reconstructions": [pictures("images generated from conditions", "reconstructions/grid")],
        "samples": [pictures("generated images", "samples/grid")],
        "data": [lines("samples skipped", "data/skipped"), every("truncated texts", "^data/.*_cut$")],
        "perf": [
            lines("images per second", "perf/images_per_second"),
            lines("peak memory, GB", "perf/memory_gb"),
            lines("skipped steps (not finite)", "perf/skipped_steps"),
        ],
        "optimizer": [every("learning rate", "^optimizer/lr")],
    }
    names: dict[str, list[str]] = {}
    for name in logged:
        if "/" in name and (prefix := name.split("/", 1)[0]) not in (*sections, STEP.split("/", 1)[0]):
            names.setdefault(prefix, []).append(name)
    for prefix, several in names.items():
        drawn = [name for name in several if name.endswith(PICTURE)]
        curves = [every(prefix, f"^{prefix}/")] if len(drawn) < len(several) else []
        sections[prefix] = [*curves, *([pictures(prefix, *drawn)] if drawn else [])]
    first = ("selection", "eval", "report")
    return ws.Workspace(
        entity=entity,
        project=project,
        name="clipfix",
        sections=[ws.Section(name=name, panels=panels, is_open=name in first) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=STEP, group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(groupby=[ws.Config(key) for key in GROUPED_BY]),
    )


def logged_here(outputs: Path) -> list[str]:
    """Return the names that the runs in a folder logged: curves from metrics.csv, pictures from the files of W&B."""
    names: dict[str, None] = {}
    for file in sorted(outputs.rglob("metrics.csv")):
        with file.open() as opened:
            names |= dict.fromkeys(next(csv.reader(opened), []))
    for file in sorted(outputs.rglob("wandb/*run-*/files/media/images/*/*.png")):
        names[f"{file.parent.name}/{MEDIA.sub('', file.name)}"] = None
    return list(names)


def lines(title: str, *metrics: str) -> wr.LinePlot:
    """Return a panel with curves of these metrics."""
    return wr.LinePlot(title=title, x=STEP, y=list(metrics), **OVER_SEEDS)


def every(title: str, regex: str) -> wr.LinePlot:
    """Return a panel with curves of all metrics whose names match, because metrics depend on method and settings."""
    return wr.LinePlot(title=title, x=STEP, metric_regex=regex, **OVER_SEEDS)


def pictures(title: str, *keys: str) -> wr.MediaBrowser:
    """Return a panel with pictures, browsed by step."""
    return wr.MediaBrowser(title=title, media_keys=list(keys), gallery_axis="step")
