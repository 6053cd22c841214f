"""Several objectives and bounds on them: what a trial is worth in each, which satisfy, which no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtune.config.metrics import COSTS, METRICS, Goal, described
from jaxtune.config.search_section import BoundConfig, SearchConfig
from jaxtune.search.outcome import Outcome
from jaxtune.search.trial import TrialState

Violation = tuple[int, float]
"""How many bounds are violated, and by how much in all, in shares of the bounds; (0, 0) where they are satisfied."""

SATISFIED: Violation = (0, 0.0)


@dataclass(frozen=True)
class Objectives:
    """What a study is after.

    Attributes:
      names: of the objectives; the first decides.
      where: bounds by the name of a metric or a counted cost.
      goal: which way the first objective is better.
    """

    names: tuple[str, ...] = ("loss",)
    where: Mapping[str, BoundConfig] = field(default_factory=dict)
    goal: Goal = METRICS["loss"].goal

    @classmethod
    def of(cls, search: SearchConfig, goal: Goal | None = None) -> Objectives:
        """Of a search, with the direction of its objective where it is not the metric's."""
        names = tuple(search.objectives) or (search.objective,)
        return cls(names, search.where, goal or METRICS[search.objective].goal)

    @classmethod
    def recorded(cls, header: Mapping[str, Any]) -> Objectives:
        """Of a journal's first record."""
        objective = header["objective"]
        names = tuple(header.get("objectives") or [objective["name"]])
        where = {name: BoundConfig(**bounds) for name, bounds in (header.get("where") or {}).items()}
        return cls(names, where, Goal.of(objective))

    @property
    def several(self) -> bool:
        """Whether there are trade-offs to be made."""
        return len(self.names) > 1

    @property
    def shown(self) -> tuple[str, ...]:
        """What people are shown of a trial beside its score: the further objectives, and what is bounded."""
        return tuple(name for name in dict.fromkeys([*self.names[1:], *self.where]) if name != self.names[0])

    def goals(self) -> tuple[Goal, ...]:
        """Which way each objective is better."""
        return (self.goal, *(described(name).goal for name in self.names[1:]))

    def value(self, name: str, state: TrialState, outcome: Outcome | None) -> float | None:
        """What a trial has of a metric at one of its steps, or of a counted cost; None where it is not known or finite.

        Args:
          name: of the metric or cost.
          state: the trial.
          outcome: at that step.
        """
        if name in COSTS:
            found = state.costs.get(name)
        elif outcome is None or outcome.failed:
            return None
        elif name == self.names[0]:
            found = outcome.score
        else:
            found = outcome.metrics.get(described(name).logged or name)
        return None if found is None or not math.isfinite(found) else found

    def values(self, state: TrialState, outcome: Outcome | None) -> dict[str, float | None]:
        """All objectives of a trial at one of its steps, and what is bounded, by name."""
        return {name: self.value(name, state, outcome) for name in (self.names[0], *self.shown)}

    def violation(self, state: TrialState, outcome: Outcome | None, *, counted: bool = True) -> Violation:
        """By how much a trial violates the bounds; what is not known violates them without measure.

        Args:
          state: the trial.
          outcome: at the step that is looked at.
          counted: False leaves counted costs out.
        """
        bounds = {name: bound for name, bound in self.where.items() if counted or name not in COSTS}
        return violation(bounds, {name: self.value(name, state, outcome) for name in bounds})

    def front(self, values: Mapping[int, Mapping[str, float | None]]) -> list[int]:
        """Trials that no other one beats or equals in all objectives and beats in one (Pareto), by number.

        Args:
          values: of each trial, by name; one that lacks an objective is on no front.
        """
        signed = {
            number: tuple(goal.signed(value) for goal, value in zip(self.goals(), row, strict=True))
            for number, of in values.items()
            if len(row := [value for name in self.names if (value := of[name]) is not None]) == len(self.names)
        }
        return sorted(
            number
            for number, own in signed.items()
            if not any(
                other != own and all(one <= mine for one, mine in zip(other, own, strict=True))
                for other in signed.values()
            )
        )


def violation(where: Mapping[str, BoundConfig], values: Mapping[str, float | None]) -> Violation:
    """By how much values violate bounds."""
    count, excess = 0, 0.0
    for name, bound in where.items():
        value = values.get(name)
        for limit, sign in ((bound.below, 1.0), (bound.above, -1.0)):
            if limit is None:
                continue
            if value is None:
                count, excess = count + 1, math.inf
            elif sign * (value - limit) >= 0:
                count, excess = count + 1, excess + sign * (value - limit) / (abs(limit) or 1.0)
    return count, excess


def bounds_in_words(where: Mapping[str, BoundConfig]) -> str:
    """``adapter_bytes below 8,000,000 and exact_match above 0.2``."""
    return " and ".join(
        f"{name} {word} {described(name).format.format(limit) if name in COSTS else f'{limit:g}'}"
        for name, bound in where.items()
        for word, limit in (("above", bound.above), ("below", bound.below))
        if limit is not None
    )


def pareto(objectives: Objectives, trials: Mapping[int, TrialState]) -> list[dict[str, Any]]:
    """The front of a study at its fraction, where all of its trials compare.

    Of the trials that satisfy the bounds there, or of all where none does.

    Returns:
      Of each trial on it ``trial``, ``values`` (by name, at the fraction) and ``final`` (at the end; None where it was
      not finished), in the order of the first objective.
    """
    scored = {number: state for number, state in trials.items() if state.ranked}
    satisfying = [n for n, state in scored.items() if objectives.violation(state, state.early) == SATISFIED]
    of = {n: objectives.values(scored[n], scored[n].early) for n in satisfying or scored}
    entries = [
        {
            "trial": number,
            "values": of[number],
            "final": objectives.values(trials[number], trials[number].final) if trials[number].finished else None,
        }
        for number in objectives.front(of)
    ]
    return sorted(entries, key=lambda entry: objectives.goal.signed(entry["values"][objectives.names[0]]))


def recorded_where(where: Mapping[str, BoundConfig]) -> dict[str, dict[str, float]]:
    """The bounds as a journal and a summary have them."""
    return {name: bound.model_dump(exclude_none=True) for name, bound in where.items()}
