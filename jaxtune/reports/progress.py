"""How far a study is: what trains now, what is done, and about how long the rest will take."""

from __future__ import annotations

import dataclasses

from jaxtune.reports import formatting
from jaxtune.reports.headline import find_winner
from jaxtune.reports.records import StudyRecord, TrialRecord
from jaxtune.search.repeats import FINALISTS


@dataclasses.dataclass(frozen=True)
class AtWork:
    """A trial that is training.

    Attributes:
      trial: its number.
      doing: "to its early score", "to step 40" or "to the end".
      step, until: the last logged step, and the one at which it will be scored; None where its length is not known yet.
      share: of these steps, in per cent.
      loss, validation: the last training and validation loss as text.
    """

    trial: int
    doing: str
    step: int
    until: int | None
    share: float
    loss: str
    validation: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """A study under way.

    Attributes:
      scored: "7 of 16": trials that have an early score or diverged.
      finished: "1 of 6": trials trained to the end, of those that will be; "" where no number was set.
      best: the leader's score as text.
      best_of: whose it is and where: "trial 3, at 20 %".
      run: steps run, as text.
      share: of all steps that the study will run, in per cent; None while its trials' length is not known.
      used: time in which something was trained.
      left: about how long the rest will take; "" while that is not known.
      at_work: trials that train now.
      written: when the study last wrote something, in seconds since the epoch.
    """

    scored: str
    finished: str
    best: str
    best_of: str
    run: str
    share: float | None
    used: str
    left: str
    at_work: list[AtWork]
    written: float


def progress(study: StudyRecord) -> Progress:
    """The progress of a study that has not ended."""
    length = trial_length(study)
    repeated = (state.repeats.values() for state in study.recorded.history.trials.values())
    run = sum(trial.steps for trial in study.trials) + sum(one.steps_run for each in repeated for one in each)
    left = None if length is None else steps_left(study, length)
    # Until a trial is scored, most of the time went into compiling.
    scored = any(trial.seconds for trial in study.trials)
    expected = left * study.durations.elapsed / run if left is not None and run and scored else None
    best, best_of = _best(study)
    finals = _finals(study)
    return Progress(
        scored=f"{sum(_passed(trial) for trial in study.trials)} of {max(study.planned, len(study.trials))}",
        finished=f"{len(study.finished)} of {finals}" if finals else "",
        best=best,
        best_of=best_of,
        run=formatting.number(run, 9),
        share=None if left is None else round(100 * run / max(run + left, 1), 1),
        used=formatting.seconds(study.durations.work),
        left="" if expected is None else formatting.roughly(expected),
        at_work=[_at_work(study, trial, length) for trial in study.trials if trial.training],
        written=study.written,
    )


def trial_length(study: StudyRecord) -> int | None:
    """A trial's full length: the configuration's, else that of the trials scored so far; None while nobody knows."""
    train = study.config.get("train")
    steps = train.get("steps") if isinstance(train, dict) else None
    known = sorted(trial.total_steps for trial in study.trials if trial.total_steps)
    return known[len(known) // 2] if known else (steps if isinstance(steps, int) else None)


def steps_left(study: StudyRecord, length: int) -> int:
    """Optimizer steps that the study still has to run.

    Every trial goes to the fraction; the reference and as many others as are to be promoted go on to each rung after it
    and to the end, those under way among them. Trials that a method stops before make it less.

    Args:
      study: the study.
      length: of a trial whose own length is not known.
    """
    left = 0
    for trial in study.trials:
        whole = trial.total_steps or length
        if trial.status in ("waiting", "running"):
            left += max(0, early_step(study, whole) - trial.steps)
        elif trial.status == "promoted":
            left += max(0, next_step(study, trial, whole) - trial.steps)
    left += max(0, study.planned - len(study.trials)) * early_step(study, length)
    before = early_step(study, length)
    for leg, step in enumerate(study.recorded.shares.steps(length).legs):
        left += max(0, _finals(study, leg) - _gone_on(study, leg, length)) * (step - before)
        before = step
    return left + _repeats_left(study, length)


def _repeats_left(study: StudyRecord, length: int) -> int:
    """Steps of the repetitions with other seeds that are still to come."""
    seeds = study.recorded.header.get("seeds") or 1
    done = sum(len(state.repeats) for state in study.recorded.history.trials.values())
    return max(0, min(FINALISTS, _finals(study)) * (seeds - 1) - done) * length


def next_step(study: StudyRecord, trial: TrialRecord, length: int) -> int:
    """The rung after the fraction, or the end, that a trial of this length is on its way to."""
    return next((step for step in study.recorded.shares.steps(length).legs if step >= trial.steps), length)


def _gone_on(study: StudyRecord, leg: int, length: int) -> int:
    """How many trials have come to a rung after the fraction, or are on their way to it."""

    def gone(trial: TrialRecord) -> bool:
        whole = trial.total_steps or length
        step = study.recorded.shares.steps(whole).legs[leg]
        on_the_way = trial.status == "promoted" and next_step(study, trial, whole) >= step
        return trial.status == "finished" or on_the_way or (trial.status == "scored" and trial.steps >= step)

    return sum(map(gone, study.trials))


def early_step(study: StudyRecord, length: int) -> int:
    """The step at which a trial of this length is scored."""
    return study.recorded.shares.steps(length).early


def _finals(study: StudyRecord, leg: int = -1) -> int:
    """How many trials are trained to a rung after the fraction, or the end: those promoted, and the reference.

    It is not if it diverged.
    """
    if study.fraction == 1:
        return max(study.planned, len(study.trials)) - sum(trial.status == "failed" for trial in study.trials)
    reference = next((trial for trial in study.trials if trial.reference), None)
    promoted = min(
        study.recorded.shares.promotions(study.promote)[leg] if study.promote else 0,
        max(study.planned, len(study.trials)) - 1,
    )
    return promoted + (reference is None or reference.status != "failed") if study.promote else 0


def _passed(trial: TrialRecord) -> bool:
    return trial.early_score is not None or trial.status in ("stopped", "failed")


def _at_work(study: StudyRecord, trial: TrialRecord, length: int | None) -> AtWork:
    whole = trial.total_steps or length
    doing, until = "to the end", whole
    if whole is not None and trial.status == "promoted":
        until = next_step(study, trial, whole)
        doing = doing if until == whole else f"to step {until}"
    elif whole is not None:
        doing, until = "to its early score", early_step(study, whole)
    losses = [loss for _, loss in trial.curve if loss is not None]
    validation = [loss for _, loss in trial.validation if loss is not None]
    return AtWork(
        trial=trial.id,
        doing=doing,
        step=trial.steps,
        until=until,
        share=round(100 * min(1.0, trial.steps / until), 1) if until else 0.0,
        loss=formatting.number(losses[-1] if losses else None),
        validation=formatting.number(validation[-1] if validation else None),
    )


def _best(study: StudyRecord) -> tuple[str, str]:
    leader = find_winner(study)
    if leader is None:
        return formatting.ABSENT, ""
    trial = leader.trial
    name = "the reference" if trial.reference else f"trial {trial.id}"
    score = trial.final_score if leader.final else trial.early_score
    where = "the end" if leader.final else formatting.percentage(study.fraction)
    return formatting.score(score, study.objective), f"{name}, at {where}"
