"""What every experiment does first: its directory, its checks, its runner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxtune.config import Config
from jaxtune.files import check_writable
from jaxtune.search.checks import check_space, check_trials
from jaxtune.search.population_size import population_size
from jaxtune.search.trainer_runner import TrainerRunner, search_config
from jaxtune.studies.output import output_directory
from jaxtune.training.experiment import Experiment
from jaxtune.training.fit import Listener
from jaxtune.training.run_directory import RunDirectory


def experiment_config(config: Config, study: str) -> Config:
    """The configuration with the run directory of one experiment: ``runs/<study>-<name>`` where none is given."""
    if config.run_dir is not None:
        return config
    return config.model_copy(update={"run_dir": f"runs/{study}-{config.name}"})


def open_runner(
    config: Config,
    study: str,
    *,
    listener: Callable[[str], Listener] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainerRunner:
    """Checks everything that can be checked before training, opens model and data, and makes the runner.

    Raises:
      UserError: the input is wrong, or the run directory or the folder of the results cannot be used.
    """
    search_config(config)
    check_space(config)
    RunDirectory(config.directory, study=True).check(config)
    check_writable(output_directory(config, study), "study.output")
    runner = TrainerRunner(Experiment(config), listener=listener, should_stop=should_stop)
    check_trials(config, runner)
    runner.capacity = population_size(runner, Path(config.directory))
    return runner


def claim(config: Config) -> None:
    """Writes the configuration into the run directory, or finds it there."""
    RunDirectory(config.directory, study=True).claim(config)
