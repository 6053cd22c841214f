"""A study from configuration to summary: what ``jaxtune search`` does."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from jaxtune.config import Config
from jaxtune.config.paths import located
from jaxtune.errors import UserError
from jaxtune.layout import RunFiles
from jaxtune.search.checks import check_space, checked_runner
from jaxtune.search.costs import Count
from jaxtune.search.directory import train_command
from jaxtune.search.distributed import check_distributed, is_distributed
from jaxtune.search.enough import Budget
from jaxtune.search.header import read_data
from jaxtune.search.journal import check_free, read_journal
from jaxtune.search.lora_space import with_space
from jaxtune.search.memory import check_memory
from jaxtune.search.milestones import Milestones
from jaxtune.search.repeats import FINALISTS
from jaxtune.search.results import StudySummary
from jaxtune.search.runner import Interrupted, TrialRunner
from jaxtune.search.settings import Settings, search_config
from jaxtune.search.study import Study
from jaxtune.search.summary import write_summary
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.search.trial import Trial
from jaxtune.search.warm_start import best_configurations
from jaxtune.telemetry.progress import ProgressBoard, watched
from jaxtune.training.adapter_start import with_adapter
from jaxtune.training.data_history import Fingerprints
from jaxtune.training.hooks import NOBODY, Event, Hooks, Listener, OnPlan, ShouldStop, never
from jaxtune.training.idle_keys import tell_idle_keys
from jaxtune.training.memory import check_base
from jaxtune.training.preflight import examine
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.template_date import with_date
from jaxtune.updates.peft.base import follow_base

if TYPE_CHECKING:
    from jaxtune.search.distributed.runner import RayRunner

logger = logging.getLogger(__name__)


def search(
    config: Config,
    *,
    listener: Callable[[str], Listener | None] | Literal["auto"] | None = "auto",
    on_event: Event | None = None,
    on_plan: OnPlan | None = None,
    should_stop: ShouldStop = never,
    accept_changed_data: bool = False,
) -> StudySummary | None:
    """Runs the study of a configuration in its run directory, or goes on where an earlier process was stopped.

    Args:
      config: with a ``search`` section.
      listener: makes the progress display of a trial, given its title; ``auto`` shows bars where someone looks, at a
        terminal or in a notebook, and None shows nothing.
      on_event: is told every journal record.
      on_plan: is told what is trained, rows of a table, before the first trial.
      should_stop: asked after every step and between trials.
      accept_changed_data: go on where the training or the validation split is not what it was; otherwise refused.

    Returns:
      The summary; None if it was stopped before its end.

    Raises:
      UserError: the input is wrong, the directory holds another run, its data have changed, or every trial diverged.
    """
    told = functools.partial(watched, board=ProgressBoard()) if listener == "auto" else listener
    return run_search(config, Hooks(told, on_event, should_stop, accept_changed_data), on_plan)


def run_search(config: Config, hooks: Hooks, on_plan: OnPlan | None = None) -> StudySummary | None:
    """As :func:`search`, for who has its hooks together."""
    config = with_space(with_adapter(config))
    check_space(config)
    check_distributed(search_config(config))
    config = with_date(config)
    directory = RunDirectory(config.directory, study=True)
    directory.check(config)
    if (finished := directory.read_summary()) is not None:
        follow_base(directory.adapter_path)
        return _with_command(config, finished)
    check_free(directory.path)
    try:
        runner, plan, data = _open_runner(config, hooks)
    except Interrupted:
        return None
    try:
        study = make_study(config, runner, hooks, keep=runner.save_winner, data=data, costs=runner.costs)
        if on_plan:
            on_plan(plan)
        if study.settings.straight is not None:
            logger.info("finishing straight to the end: %s", study.settings.straight)
        directory.claim(config)
        summary = study.run()
    finally:
        runner.close()
    if summary is not None:
        write_summary(directory.path, _with_command(config, summary))
    return summary


def _open_runner(
    config: Config, hooks: Hooks
) -> tuple[TrainerRunner | RayRunner, Sequence[Mapping[str, Any]], Fingerprints]:
    """What trains the trials, here or in workers; what it trains, rows of a table; fingerprints of its data.

    Raises:
      Interrupted: told to stop before a worker had opened.
      UserError: the configuration does not fit its model, its data or the devices, or there are no workers to be had.
    """
    if is_distributed(search_config(config)):
        # Loads Ray, which an installation need not have.
        from jaxtune.search.distributed.runner import RayRunner

        workers = RayRunner(config, should_stop=hooks.should_stop)
        return workers, workers.plan, workers.fingerprints
    runner = checked_runner(config, hooks=hooks)
    plan = runner.opened.trainer().plan
    tell_idle_keys(runner.opened.config, plan)
    return runner, plan.table(), runner.opened.fingerprints


def make_study(
    config: Config,
    runner: TrialRunner,
    hooks: Hooks = NOBODY,
    *,
    keep: Callable[[Trial], Mapping[str, Any]] | None = None,
    data: Fingerprints | None = None,
    costs: Count | None = None,
) -> Study:
    """The study of a configuration, over a runner; ``keep`` is told of its winner, ``costs`` counts what one costs."""
    settings = Settings.of(config)
    return Study(
        config.directory,
        settings,
        runner,
        start=starting_trials(settings),
        on_event=hooks.on_event,
        should_stop=hooks.should_stop,
        keep=keep,
        data=data,
        accept_changed_data=hooks.accept_changed_data,
        costs=costs,
    )


def starting_trials(settings: Settings) -> list[dict[str, Any]]:
    """The trials that an earlier study gives this one to begin with: those it began with, if it has begun.

    Raises:
      UserError: ``search.start_from`` names no study, or one over other keys, or this one has begun without it.
    """
    search, config = settings.search, settings.config
    if search.start_from is None or config is None:
        return []
    if RunFiles(config.directory).journal_path.exists() and (records := read_journal(config.directory)):
        if not (begun := records[0].get("start", [])):
            raise UserError(
                f"search.start_from: the study in {config.directory} has begun without trials of another one; leave it "
                f"out, or choose another run_dir"
            )
        return begun
    start_from = search_config(located(config)).start_from or search.start_from
    return best_configurations(start_from, settings.space, min(search.initial, search.trials) - 1)


def _first_steps(trials: int, stops: Milestones) -> int:
    """Steps until all trials of a study are scored, or stopped at the ladder; without divergences."""
    total, before = 0, 0
    for step in (*stops.rungs, stops.early):
        total += trials * (step - before)
        # The reference climbs beside the better half of the others.
        trials, before = 1 + math.ceil((trials - 1) / 2), step
    return total


def _last_steps(numbers: Sequence[int], stops: Milestones) -> int:
    """Steps until all trials are finished that are to be; the reference is one of them."""
    legs = itertools.pairwise((stops.early, *stops.legs))
    return sum((number + 1) * (step - before) for number, (before, step) in zip(numbers, legs, strict=True))


def _with_command(config: Config, summary: dict[str, Any]) -> StudySummary:
    """The summary with the command of its winner, which names the directory as it is named now."""
    summary["best"]["command"] = winner_command(config, summary["best"]["configuration"])
    return StudySummary(summary)


def winner_command(config: Config, configuration: Mapping[str, Any]) -> str:
    """The command line that trains the winner by itself."""
    return train_command(config.directory, configuration, f"{config.directory}-winner")


def preflight_search(config: Config, *, accept_changed_data: bool = False) -> dict[str, Any]:
    """Everything that can be checked before a study: files, data, space, shapes, memory; writes nothing.

    Args:
      config: with a ``search`` section.
      accept_changed_data: see :func:`search`.

    Raises:
      UserError: anything that would stop the study is wrong, or a step of it does not fit the memory.
    """
    config = with_space(with_adapter(config))
    check_space(config)
    check_distributed(search_config(config))
    config = with_date(config)
    directory = RunDirectory(config.directory, study=True)
    directory.check(config)
    check_base(config)
    runner = checked_runner(config)
    opened = runner.opened
    what = f"the study in {directory.path}"
    read_data(directory.path).follow(opened.fingerprints, what, accept=accept_changed_data)
    settings = make_study(config, runner, costs=runner.costs).settings
    checked = examine(opened, runner.trainer(opened.config), check_memory(runner))
    search, stops = settings.search, settings.milestones(checked.steps)
    paid = Budget.of(settings, runner).trials(Trial(0, dict(settings.reference), directory.path))
    trials = search.trials if paid is None else paid
    legs = [
        {"share": share, "step": step, "trials": min(number, trials - 1)}
        for share, step, number in zip(settings.shares.finish, stops.legs, settings.promotions, strict=True)
    ]
    repeated = min(FINALISTS, legs[-1]["trials"] + 1) if search.seeds > 1 else 0
    further = repeated * (search.seeds - 1) * stops.total
    steps = _first_steps(trials, stops) + _last_steps([leg["trials"] for leg in legs], stops) + further
    return {
        **checked.as_dict(),
        "space": {key: dimension.model_dump(exclude_none=True) for key, dimension in search.space.items()},
        "trials": search.trials,
        "budget": search.budget and {**search.budget.model_dump(exclude_none=True), "trials": paid},
        "population": runner.capacity,
        "promote": search.promote,
        "promote_by": search.promote_by,
        "steps_per_trial": checked.steps,
        "early_steps": stops.early,
        "finish": legs,
        "straight": settings.straight,
        "repeats": {"trials": repeated, "seeds": search.seeds, "steps": further},
        "steps": steps,
    }
