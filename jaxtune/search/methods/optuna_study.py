"""A study's trials as Optuna sees them: an in-memory study, made afresh for every question and thrown away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.errors import UserError
from jaxtune.search.observation import Observation
from jaxtune.search.space import Point, Space

if TYPE_CHECKING:
    import optuna.distributions
    import optuna.samplers
    import optuna.study
    import optuna.trial

# Hyperband's pruner draws a trial's bracket from the study's name and the trial's number.
STUDY_NAME = "jaxtune"


def require_optuna(method: str) -> None:
    """Imports Optuna.

    Raises:
      UserError: it is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UserError(f"search.method: {method!r} needs Optuna: pip install 'jaxtune[optuna]'") from error


def empty_study(sampler: optuna.samplers.BaseSampler | None = None) -> optuna.study.Study:
    """A study without trials that minimises; made without Optuna's line in the log, which each proposal would add."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(study_name=STUDY_NAME, sampler=sampler, direction="minimize")
    finally:
        optuna.logging.set_verbosity(verbosity)


def distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    """The space's coordinates as Optuna's distributions: exponents and whole numbers as integers, choices by index."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, Any] = {}
    for dimension in space.dimensions:
        low, high = dimension.low, dimension.high
        if dimension.kind == "choice":
            made[dimension.key] = CategoricalDistribution(range(len(dimension.choices)))
        elif dimension.continuous:
            made[dimension.key] = FloatDistribution(float(low), float(high), log=dimension.kind == "log_uniform")
        else:
            made[dimension.key] = IntDistribution(int(low), int(high))
    return made


def told_trials(space: Space, told: Sequence[Observation], pending: Sequence[Point]) -> list[optuna.trial.FrozenTrial]:
    """Scored trials as complete, stopped ones as pruned at their rung, diverged as pruned at none, pending as running.

    Optuna takes complete trials for better than pruned ones, and of these such with a later report for better.
    """
    from optuna.trial import TrialState, create_trial

    space_of = distributions(space)

    def trial(point: Point, **fields: Any) -> optuna.trial.FrozenTrial:
        return create_trial(params=dict(zip(space.keys, point, strict=True)), distributions=space_of, **fields)

    made = []
    for observation in told:
        if observation.score is None:
            made.append(trial(observation.point, state=TrialState.PRUNED))
        elif observation.stopped is None:
            made.append(trial(observation.point, value=observation.score))
        else:
            scores = {observation.stopped: observation.score}
            made.append(trial(observation.point, state=TrialState.PRUNED, intermediate_values=scores))
    return [*made, *(trial(point, state=TrialState.RUNNING) for point in pending)]


def reported_trials(reports: Mapping[int, Mapping[int, float]]) -> list[optuna.trial.FrozenTrial]:
    """Running trials with their scores so far, placed so that Optuna's numbers are ours; gaps are failed trials."""
    from optuna.trial import TrialState, create_trial

    return [
        create_trial(state=TrialState.RUNNING, intermediate_values=dict(reports[number]))
        if number in reports
        else create_trial(state=TrialState.FAIL)
        for number in range(max(reports) + 1)
    ]
