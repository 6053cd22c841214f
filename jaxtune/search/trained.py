"""What a study trained, put back onto the model: its winner, or any trial that was finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtune.errors import UserError
from jaxtune.layout import RunFiles
from jaxtune.search.directory import train_command
from jaxtune.search.status import Recorded, read_recorded
from jaxtune.search.trainer_runner import TrainerRunner
from jaxtune.search.trial import Trial, TrialState
from jaxtune.training.checkpoints import UnreadableCheckpoint
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run_directory import RunDirectory
from jaxtune.training.trained import Trained


def winner(run_dir: str | Path, naming: str = "--trial ") -> TrialState:
    """The winner of a study that has ended.

    Args:
      run_dir: of the study.
      naming: what stands before a trial's number where messages tell how to name one.

    Raises:
      UserError: there is no study, or it has no winner; names what to do.
    """
    recorded = read_recorded(run_dir)
    directory, kind = recorded.directory, recorded.header.get("experiment")
    if kind:
        raise UserError(
            f"{directory}: the trials of the experiment {kind}, which has no winner; {_choices(recorded, naming)}"
        )
    ahead = recorded.leader if recorded.ended else None
    if ahead is None:
        raise UserError(
            f"{directory}: the study has not ended, so it has no winner yet; to go on with it: jaxtune search "
            f"{RunFiles(directory).config_path}; or {_choices(recorded, naming)}"
        )
    return ahead


def finished_trial(run_dir: str | Path, number: int, naming: str = "--trial ") -> TrialState:
    """A trial of a study that was trained to its end.

    Args:
      run_dir: of the study.
      number: of the trial.
      naming: see :func:`winner`.

    Raises:
      UserError: there is no study or no such trial, or it was not finished; names the nearest one that was.
    """
    recorded = read_recorded(run_dir)
    trials = recorded.history.trials
    state = trials.get(number)
    if state is None:
        there = f"trials {min(trials)} to {max(trials)}" if trials else "no trials yet"
        problem = f"no such trial; {recorded.directory} has {there}"
    elif not state.finished:
        done = max((outcome.steps_run for outcome in state.outcomes), default=0)
        length = f" of {state.total_steps}" if state.total_steps else ""
        problem = f"not finished, but {state.status} (step {done}{length})"
    else:
        return state
    raise UserError(f"{naming}{number}: {problem}; {_choices(recorded, naming, number)}")


def any_trial(run_dir: str | Path, number: int) -> TrialState:
    """A trial of a study, however far it is.

    Raises:
      UserError: there is no study or no such trial; names the nearest one that was finished.
    """
    state = read_recorded(run_dir).history.trials.get(number)
    return finished_trial(run_dir, number) if state is None else state


def _choices(recorded: Recorded, naming: str, number: int | None = None) -> str:
    """Which trials there are to choose from, the nearest or the leading one first."""
    finished = sorted(index for index, state in recorded.history.trials.items() if state.finished)
    if not finished:
        instead = "--adapter or --untuned" if naming.startswith("-") else f"{naming}untuned"
        return f"no trial is finished yet: name {instead}"
    if number is not None:
        first = min(finished, key=lambda index: abs(index - number))
    else:
        ahead = recorded.leader
        first = ahead.trial.id if ahead is not None and ahead.finished else finished[0]
    return f"name {naming}{first}{_others(finished, first)}"


def _others(finished: Sequence[int], first: int) -> str:
    others = [str(index) for index in finished if index != first]
    shown = ", ".join(others[:12]) + (", …" if len(others) > 12 else "")
    return f" (finished as well: {shown})" if others else ", the only one that is finished"


def trained_trial(opened: OpenedConfig, state: TrialState, *, origin: str | None = None) -> Trained:
    """The state that a trial was scored with last, as the study tested it.

    Args:
      opened: the study's configuration, opened.
      state: the trial.
      origin: what it is, for people, without the step; by default trial and study.

    Raises:
      UserError: its checkpoint is gone or damaged, or it is one of another configuration.
    """
    trial = state.trial
    if opened.config.search is None:
        raise UserError(
            f"{opened.config.directory}: its trials differ in their data, not in the configuration (it has no "
            "search section); jaxtune train runs any of them by itself"
        )
    # What epochs come to is not known where no example is read; the journal tells it of all that were scored.
    length = {"train.steps": state.total_steps or 1, "train.epochs": None}
    try:
        trainer, _, loaded = TrainerRunner(opened).load(trial, length)
    except UnreadableCheckpoint as error:
        raise UserError(f"{error}; {_instead(opened.config.directory, trial)}") from error
    name = origin or f"trial {trial.id} of {opened.config.directory}"
    return Trained(trainer, loaded, f"{name} at step {int(loaded.step)}")


def _instead(run_dir: str | Path, trial: Trial) -> str:
    """What to do where the checkpoint that a trial was scored with cannot be read."""
    directory = RunDirectory(run_dir, study=True)
    kept = (directory.read_summary() or {}).get("adapter")
    by_adapter = f"or name --adapter {kept['path']}, " if kept and kept["trial"] == trial.id else ""
    again = train_command(run_dir, trial.configuration, f"{run_dir}-{trial.id}")
    return f"restore it from a copy, {by_adapter}or train it again: {again}"
