"""The W&B workspace in which runs are looked at: one section a metric prefix, runs grouped by method and backbone."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

# By what `report.describe` wrote into the config of each run.
GROUPED_BY = ("choices.method", "choices.backbone")
PICTURE = "/grid"  # the end of a picture's name
MEDIA = re.compile(r"_\d+_[0-9a-f]+\.png$")  # what W&B adds to it in the name of its file: step and hash
STEP = "trainer/global_step"  # optimizer steps, as Lightning writes them beside every value
# Runs of a group differ by seed: their mean, and their standard deviation around it.
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
        scored: The benchmarks that a run is scored by, before and after.
        watched: The benchmarks that score the selection split.
        selected_by: The metric of the selection split that chooses the checkpoint.
        logged: Names that runs logged. Prefixes that no section below is for get one each, so that the notes of a new
            method are shown without an edit here; a name that ends in `/grid` is a picture.
    """
    sections: dict[str, list[Any]] = {
        "selection": [
            *([lines(selected_by, f"selection/{selected_by}")] if selected_by else []),
            *(every(name, f"^selection/{name}/") for name in watched),
        ],
        # Two points a run: before the repair, at step 0, and after it.
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
            every("promoted, an image", "^positives/.*_per_image$"),
            every("promoted, percent", "^positives/.*_percent$"),
        ],
        "promoted": [pictures("promoted pairs", "promoted/grid")],
        "reconstructions": [pictures("what the generator makes of each condition", "reconstructions/grid")],
        "samples": [pictures("what the generator draws", "samples/grid")],
        "data": [lines("samples skipped", "data/skipped"), every("texts cut off", "^data/.*_cut$")],
        "perf": [
            lines("images a second", "perf/images_per_second"),
            lines("peak memory, GB", "perf/memory_gb"),
            lines("steps passed over: not finite", "perf/skipped_steps"),
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
    """Return the names that the runs in a folder logged: of curves from metrics.csv, of pictures from W&B's files."""
    names: dict[str, None] = {}
    for file in sorted(outputs.rglob("metrics.csv")):
        with file.open() as opened:
            names |= dict.fromkeys(next(csv.reader(opened), []))
    for file in sorted(outputs.rglob("wandb/*run-*/files/media/images/*/*.png")):
        names[f"{file.parent.name}/{MEDIA.sub('', file.name)}"] = None
    return list(names)


def lines(title: str, *metrics: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, y=list(metrics), **OVER_SEEDS)


def every(title: str, regex: str) -> wr.LinePlot:
    """All metrics whose names match: which there are depends on the method and on its settings."""
    return wr.LinePlot(title=title, x=STEP, metric_regex=regex, **OVER_SEEDS)


def pictures(title: str, *keys: str) -> wr.MediaBrowser:
    return wr.MediaBrowser(title=title, media_keys=list(keys), gallery_axis="step")
