"""One run: its config, its folder, and what is built from them once."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from clipfix.cli.resolvers import quiet_wandb
from clipfix.cli.sweeps import in_sweep
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


@dataclass(frozen=True)
class Run:
    """What a verb gets. Heavy libraries are imported when something is first built.

    Args:
        config: The whole config, composed.
        choices: {group: name of its choice}.
        words: The words of the command line.
        folder: The run folder.
        groups: The config groups that this verb reads.
    """

    config: DictConfig
    choices: Mapping[str, str]
    words: Sequence[str]
    folder: Path
    groups: Sequence[str]
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of_hydra(cls, config: DictConfig, groups: Sequence[str]) -> "Run":
        """Return the run that Hydra has just composed."""
        hydra = HydraConfig.get()
        return cls(config, hydra.runtime.choices, hydra.overrides.task, Path(hydra.runtime.output_dir), groups)

    # -- what is built once --------------------------------------------------------------------------------------------

    @cached_property
    def benchmarks(self) -> dict[str, Any]:
        """The benchmarks of `eval` whose data is there.

        Published data is looked for by its own settings: what is missing is named before torch is imported.
        """
        from clipfix.data.sets import present

        wanted = dict(self.config.eval.benchmarks)
        published = {
            name: instantiate(one.shards) for name, one in wanted.items() if OmegaConf.is_dict(one.get("shards"))
        }
        return {name: instantiate(one) for name, one in present(wanted, published).items()}

    @cached_property
    def backbone(self) -> Any:
        """The backbone of the config, loaded after `seed_and_check`."""
        self.seed_and_check()
        return instantiate(self.config.backbone)

    @cached_property
    def loggers(self) -> list[Any]:
        """The loggers of the config."""
        if "wandb" in self.config.logger:
            quiet_wandb()
        return list(instantiate(self.config.logger).values())

    @cached_property
    def method(self) -> Any:
        """The method of the config, around the backbone."""
        method = instantiate(self.config.method, backbone=self.backbone)
        try:
            method.configure_optimizers()
        except Exception as error:  # torch raises whatever its arithmetic meets
            raise ValueError(f"method.optimizer: {error}") from error
        return method

    @cached_property
    def data(self) -> Any:
        """The data of the config with what the method needs, complete on disk."""
        data = instantiate(self.config.data, _partial_=True)(needs=self.method.needs)  # Hydra would make a config of it
        data.prepare_data()
        data.setup("fit")
        return data

    # -- checks --------------------------------------------------------------------------------------------------------

    def seed_and_check(self) -> None:
        """Seed the process, silence harmless warnings, and refuse values of a wrong type."""
        import lightning as L

        from clipfix.cli.arguments import check_arguments

        groups = [group for group in self.groups if OmegaConf.is_dict(self.config[group])]
        check_arguments({group: resolved(self.config[group]) for group in groups}, groups)
        if "trainer" in groups:
            ranks.check(self.config.trainer.get("devices"), self.config.trainer.get("num_nodes", 1))
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", harmless)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        L.seed_everything(self.config.seed, workers=True, verbose=False)

    def check_report(self) -> None:
        """Refuse values of `report` that would only be read at the end of the run."""
        table, pictures = self.config.report.table, self.config.report.pictures
        if table not in (tables := ("headlines", "full")):
            raise ValueError(f"report.table={table}: choose from {', '.join(tables)}.")
        if not isinstance(pictures, bool):
            raise ValueError(f"report.pictures={pictures}: set true or false.")

    # -- what it leaves ------------------------------------------------------------------------------------------------

    def config_and_choices(self) -> dict[str, Any]:
        """Return the resolved config, and under `choices` the choice of each group, which the config does not name."""
        chosen = {group: name for group, name in self.choices.items() if not group.startswith("hydra/")}
        return {"choices": chosen} | shareable(self.config)

    def finish(
        self,
        scored: Mapping[str, Mapping[str, Any]],
        facts: Mapping[str, Any],
        trained: Mapping[str, Any] | None,
        *,
        weights: Mapping[str, str],
        checkpoint: str | None,
        step: int | None,
        precision: Mapping[str, str],
        loggers: Sequence[Any] = (),
    ) -> None:
        """Write the results, and print the scores, the files to open and the next command to try.

        Args:
            scored: {column: {benchmark: Scores}}.
            facts: What `provenance.facts` returned.
            trained: The config of the training that repaired the backbone; None of a backbone as it was.
            weights, checkpoint, step, precision: As in `Record`.
        """
        from clipfix.evals.base import percentages
        from clipfix.results import report
        from clipfix.results.record import Record
        from clipfix.training.callbacks import peak_memory_gb

        record = Record(
            **facts,
            **identity.repair(trained),
            **identity.asked(self.config),
            backbone=self.choices["backbone"],
            weights=weights,
            precision=precision,
            checkpoint=checkpoint,
            step=step,
            seed=self.config.seed,
            seconds=time.perf_counter() - self.started,
            peak_memory_gb=round(peak_memory_gb(), 2),
            scores={column: percentages(one) for column, one in scored.items()},
        )
        about = (self.config.eval.selection_metric or "").partition("/")[0]
        intervals = {key: self.config.compare[key] for key in ("resamples", "coverage")}
        settings = {**intervals, **self.config.report}
        report.write(self.folder, scored, self.benchmarks, record, loggers, first=about, **settings)
        if not in_sweep():
            print(*report.next_command(self.folder, record), sep="\n")


def resolved(group: DictConfig) -> dict[str, Any]:
    """Return a group without the keys that point at nothing, as data.selection does where data.prepare is null.

    Their readers report them.
    """
    found = {}
    for key in group:
        with suppress(InterpolationResolutionError):
            value = group[key]
            found[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return found


def shareable(node: DictConfig) -> dict[str, Any]:
    """Return resolved config without its secrets, as a run stores and logs it."""
    return without_secrets(OmegaConf.to_container(node, resolve=True))
