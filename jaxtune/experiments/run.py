"""What every experiment does first: its directory, its checks, its runner."""

from __future__ import annotations

from typing import Any

from jaxtune.config import Config
from jaxtune.experiments.output import output_directory
from jaxtune.files import check_writable
from jaxtune.search.checks import check_space, checked_runner
from jaxtune.search.memory import check_memory
from jaxtune.search.settings import search_config
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.training.hooks import NOBODY, Hooks
from jaxtune.training.idle_keys import idle_keys
from jaxtune.training.memory import check_base
from jaxtune.training.run_directory import RunDirectory


def experiment_config(config: Config, study: str) -> Config:
    """The configuration with the run directory of one experiment: ``runs/<study>-<name>`` where none is given."""
    if config.run_dir is not None:
        return config
    return config.model_copy(update={"run_dir": f"runs/{study}-{config.name}"})


def check_places(config: Config, study: str) -> None:
    """Whether an experiment may use its run directory and the folder of its results.

    Raises:
      UserError: it may not.
    """
    RunDirectory(config.directory, study=True).check(config)
    check_writable(output_directory(config, study), "study.output")


def open_runner(config: Config, study: str, hooks: Hooks = NOBODY) -> TrainerRunner:
    """Checks everything that can be checked before training, opens model and data, and makes the runner.

    Raises:
      UserError: the input is wrong, or the run directory or the folder of the results cannot be used.
    """
    search_config(config)
    check_space(config)
    check_places(config, study)
    check_base(config)
    return checked_runner(config, hooks=hooks)


def checked(runner: TrainerRunner) -> dict[str, Any]:
    """What a dry run tells of the step and the keys of an experiment's trials.

    Returns:
      ``memory`` (see :func:`~jaxtune.search.memory.check_memory`) and ``warnings``, of keys that never act.

    Raises:
      UserError: the step does not fit the memory.
    """
    config = runner.opened.config
    return {"memory": check_memory(runner), "warnings": idle_keys(config, runner.trainer(config).plan)}


def claim(config: Config) -> None:
    """Writes the configuration into the run directory, or finds it there."""
    RunDirectory(config.directory, study=True).claim(config)
