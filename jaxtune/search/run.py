"""A study from configuration to summary: what ``jaxtune search`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config import Config, dotted, with_overrides
from jaxtune.errors import UserError
from jaxtune.search.directory import train_command
from jaxtune.search.distributed import check_distributed, is_distributed
from jaxtune.search.journal import check_free
from jaxtune.search.population_size import population_size
from jaxtune.search.runner import Interrupted, TrialRunner
from jaxtune.search.space import Point, Space
from jaxtune.search.study import Event, Study
from jaxtune.search.summary import write_summary
from jaxtune.search.trainer_runner import TrainerRunner, direction, reference_overrides, search_config
from jaxtune.training.experiment import Experiment
from jaxtune.training.fit import Listener
from jaxtune.training.population import Population
from jaxtune.training.preflight import examine
from jaxtune.training.run_directory import RunDirectory

VARIED = ("train", "optimizer", "update", "data.packing")
"""Sections and keys in which trials can differ."""


def search(
    config: Config,
    *,
    listener: Callable[[str], Listener] | None = None,
    on_event: Event | None = None,
    on_plan: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Runs the study of a configuration in its run directory, or goes on where an earlier process was stopped.

    Args:
      config: with a ``search`` section.
      listener: makes the progress display of a trial, given its title.
      on_event: is told every journal record.
      on_plan: is told what is trained, rows of a table, before the first trial.
      should_stop: asked after every step and between trials.

    Returns:
      The summary; None if it was stopped before its end.

    Raises:
      UserError: the input is wrong, the directory holds another run, or every trial diverged.
    """
    check_space(config)
    check_distributed(search_config(config))
    directory = RunDirectory(config.directory, study=True)
    directory.check(config)
    if (finished := directory.read_summary()) is not None:
        return finished
    check_free(directory.path)
    try:
        runner, plan = _open_runner(config, listener, should_stop)
    except Interrupted:
        return None
    try:
        study = make_study(config, runner, on_event=on_event, stop=should_stop)
        if on_plan:
            on_plan(plan)
        directory.claim(config)
        summary = study.run()
    finally:
        runner.close()
    if summary is not None:
        summary["best"]["command"] = winner_command(config, summary["best"]["configuration"])
        write_summary(directory.path, summary)
    return summary


def _open_runner(
    config: Config, listener: Callable[[str], Listener] | None, should_stop: Callable[[], bool]
) -> tuple[TrialRunner, Sequence[Mapping[str, Any]]]:
    """What trains the trials, here or in workers, and what it trains, rows of a table.

    Raises:
      Interrupted: told to stop before a worker had opened.
      UserError: the configuration does not fit its model, its data or the devices, or there are no workers to be had.
    """
    if is_distributed(search_config(config)):
        # Loads Ray, which an installation need not have.
        from jaxtune.search.distributed.runner import RayRunner

        workers = RayRunner(config, should_stop=should_stop)
        return workers, workers.plan
    experiment = Experiment(config)
    runner = TrainerRunner(experiment, listener=listener, should_stop=should_stop)
    check_trials(config, runner)
    runner.capacity = population_size(runner, Path(config.directory))
    return runner, experiment.trainer().plan.table()


def make_study(config: Config, runner: TrialRunner, *, on_event: Event | None, stop: Callable[[], bool]) -> Study:
    """The study of a configuration, over a runner."""
    settings = search_config(config)
    reference = reference_overrides(config)
    return Study(
        config.directory,
        settings,
        runner,
        direction=direction(settings.objective),
        reference=reference,
        base=config.model_dump(mode="json"),
        reference_config=_reference_in_space(config, reference),
        known_keys=dotted(config),
        on_event=on_event,
        stop=stop,
    )


def check_space(config: Config) -> None:
    """Tries values of every searched key, and the reference; opens nothing.

    Raises:
      UserError: a key does not exist, is none that can differ between trials, or a value does not fit it.
    """
    settings = search_config(config)
    for dimension in Space(settings.space, dotted(config), settings.fixed).dimensions:
        _check_varied(dimension.key, "search.space")
        for value in dimension.samples():
            with_overrides(config, {dimension.key: value}, origin=f"search.space.{dimension.key}: ")
    reference = reference_overrides(config)
    for key in reference:
        _check_varied(key, "search.reference")
    with_overrides(config, reference, origin="search.reference: ")


def _check_varied(key: str, where: str) -> None:
    """Refuses keys that a study reads once for all of its trials: differing there, they would do nothing."""
    if key.split(".")[0] not in VARIED and key not in VARIED:
        raise UserError(
            f"{where}: {key!r} is the same for all trials of a study, which share one model and one reading of the "
            f"data; search over keys of {', '.join(VARIED)}"
        )


def reference_point(config: Config, space: Space) -> Point | None:
    """Where the reference lies in a configuration's space; None outside it."""
    reference = reference_overrides(config)
    inside = bool(_reference_in_space(config, reference))
    return space.point(dotted(with_overrides(config, reference))) if inside else None


def check_trials(config: Config, runner: TrainerRunner, added: Sequence[Mapping[str, Any]] = ()) -> None:
    """Tries trials with values of every searched key, and the reference, against the opened model and data.

    Args:
      config: with a ``search`` section.
      runner: over the opened experiment.
      added: configurations by hand to try as well.

    Raises:
      UserError: a value does not fit the model, its context, the devices or the data, or the fraction of its steps is
        less than a step.
    """
    trials: list[tuple[str, dict[str, Any]]] = [("", {}), ("search.reference: ", reference_overrides(config))]
    trials += [("--add: ", dict(configuration)) for configuration in added]
    for dimension in Space(search_config(config).space).dimensions:
        trials += [(f"search.space.{dimension.key}: ", {dimension.key: value}) for value in dimension.samples()]
    for origin, overrides in trials:
        try:
            variant = runner.configuration(overrides)
            _early_steps(variant)
            runner.experiment.check_lengths(variant)
            runner.trainer(variant)
        except UserError as error:
            # The value is worth saying where it is one of a dimension's.
            value = "".join(f"{value!r}: " for value in overrides.values()) if len(overrides) == 1 else ""
            raise UserError(f"{origin}{value}{error}") from error


def _early_steps(config: Config) -> int:
    """Steps after which a trial of this length is scored.

    Raises:
      UserError: the fraction is less than a step.
    """
    settings, steps = search_config(config), config.train.steps or 0
    early = round(settings.fraction * steps)
    if early < 1:
        raise UserError(f"search.fraction: {settings.fraction} of {steps} steps is less than a step")
    return early


def _reference_in_space(config: Config, reference: Mapping[str, Any]) -> dict[str, Any]:
    """The reference configuration, or nothing if it differs from the searched ones in more than the searched keys."""
    assert config.search is not None
    changed = dotted(with_overrides(config, reference))
    fixed = dotted(config).keys() - config.search.space.keys()
    same = changed.keys() == dotted(config).keys() and all(changed[key] == dotted(config)[key] for key in fixed)
    return with_overrides(config, reference).model_dump(mode="json") if same else {}


def winner_command(config: Config, configuration: Mapping[str, Any]) -> str:
    """The command line that trains the winner by itself."""
    return train_command(config.directory, configuration, f"{config.directory}-winner")


def preflight_search(config: Config) -> dict[str, Any]:
    """Everything that can be checked before a study: files, data, space, shapes, memory; writes nothing.

    Raises:
      UserError: anything that would stop the study is wrong.
    """
    check_space(config)
    check_distributed(search_config(config))
    RunDirectory(config.directory, study=True).check(config)
    experiment = Experiment(config)
    runner = TrainerRunner(experiment)
    check_trials(config, runner)
    runner.capacity = population_size(runner, Path(config.directory))
    make_study(config, runner, on_event=None, stop=lambda: False)
    # The program that trials run: compiled for the largest rank of the space.
    trainer = runner.trainer(experiment.config)
    checked = examine(experiment, trainer, Population(trainer, runner.capacity).compile_step)
    settings = search_config(config)
    early = _early_steps(experiment.config)
    finished = settings.promote + 1  # the reference is finished as well
    return {
        **checked.as_dict(),
        "trials": settings.trials,
        "population": runner.capacity,
        "promote": settings.promote,
        "steps_per_trial": checked.steps,
        "early_steps": early,
        "steps": settings.trials * early + finished * (checked.steps - early),
    }
