"""The `Run` object: the config and folder of one run, and the objects built from them."""

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

# Warnings about intended behaviour, which would push the table off the screen.
HARMLESS = (
    r"Found \d+ module\(s\) in eval mode",  # frozen models stay in eval mode
    r"`isinstance\(treespec, LeafSpec\)`",  # Lightning calls a deprecated function of torch
    r"Total length of `list` across ranks is zero",  # a run without a selection split
    r"You defined a `validation_step` but have no",  # the same
    r"Checkpoint directory .* exists and is not empty",  # a resumed run
    r"y_pred contains classes not in y_true",  # a probe on a small test split
    r"WebDataset\(shardshuffle=...\) is None",  # clip_benchmark reads in stored order on purpose
)


@dataclass(frozen=True)
class Run:
    """The argument of every verb. Objects are built on first access, which imports the heavy libraries they need.

    Args:
        config: The composed config.
        choices: {group: name of its choice}.
        overrides: The overrides on the command line.
        folder: The run folder.
        groups: The config groups that the verb reads.
    """

    config: DictConfig
    choices: Mapping[str, str]
    overrides: Sequence[str]
    folder: Path
    groups: Sequence[str]
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of_hydra(cls, config: DictConfig, groups: Sequence[str]) -> "Run":
        """Return the run for a config that Hydra has composed in this process."""
        hydra = HydraConfig.get()
        return cls(config, hydra.runtime.choices, hydra.overrides.task, Path(hydra.runtime.output_dir), groups)

    # -- objects that are built once -----------------------------------------------------------------------------------

    @cached_property
    def benchmarks(self) -> dict[str, Any]:
        """The benchmarks of `eval` whose data is on disk.

        Published data sets are built first, so that missing ones are reported before torch is imported.
        """
        from clipfix.data.sets import present

        wanted = dict(self.config.eval.benchmarks)
        published = {
            name: instantiate(one.shards) for name, one in wanted.items() if OmegaConf.is_dict(one.get("shards"))
        }
        return {name: instantiate(one) for name, one in present(wanted, published).items()}

    @cached_property
    def backbone(self) -> Any:
        """The backbone of the config, loaded after `seed_and_check` has run."""
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
        """The method of the config, with the backbone. Its optimizer is built once to check `method.optimizer`."""
        method = instantiate(self.config.method, backbone=self.backbone)
        try:
            method.configure_optimizers()
        except Exception as error:  # optimizers of torch raise many types
            raise ValueError(f"method.optimizer: {error}") from error
        return method

    @cached_property
    def data(self) -> Any:
        """The data of the config, prepared on disk and checked against the needs of the method."""
        data = instantiate(self.config.data, _partial_=True)(
            needs=self.method.needs
        )  # Hydra converts a dataclass to a config
        data.prepare_data()
        data.setup("fit")
        return data

    # -- checks --------------------------------------------------------------------------------------------------------

    def seed_and_check(self) -> None:
        """Seed the process, silence harmless warnings, and raise an error for values of a wrong type."""
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

    # -- results -------------------------------------------------------------------------------------------------------

    def config_and_choices(self) -> dict[str, Any]:
        """Return the resolved config, with the chosen option of each group under `choices`."""
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
            facts: The result of `provenance.facts`.
            trained: The config of the training run; None for an untrained backbone.
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
        main_benchmark = (self.config.eval.selection_metric or "").partition("/")[0]
        intervals = {key: self.config.compare[key] for key in ("resamples", "coverage")}
        settings = {**intervals, **self.config.report}
        report.write(self.folder, scored, self.benchmarks, record, loggers, first=main_benchmark, **settings)
        if not in_sweep():
            print(*report.next_command(self.folder, record), sep="\n")


def resolved(group: DictConfig) -> dict[str, Any]:
    """Return a resolved group without keys that cannot be resolved, such as data.selection if data.prepare is null.

    The code that reads such a key reports the error.
    """
    values = {}
    for key in group:
        with suppress(InterpolationResolutionError):
            value = group[key]
            values[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return values


def shareable(node: DictConfig) -> dict[str, Any]:
    """Return the resolved config without secrets, in the form that a run stores and logs."""
    return without_secrets(OmegaConf.to_container(node, resolve=True))
