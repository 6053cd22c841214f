"""The steps at which a trial is looked at, from the shares of its steps that a search names."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError


@dataclass(frozen=True)
class Milestones:
    """Steps of one trial, ascending.

    Attributes:
      rungs: of the ladder, where the worse half is stopped.
      early: at the fraction, where it is scored.
      total: its end.
    """

    rungs: tuple[int, ...]
    early: int
    total: int


def milestones(search: SearchConfig, total: int) -> Milestones:
    """The milestones of a trial of ``total`` steps.

    Raises:
      UserError: one of them is less than a step, or the same step as the one before, so that nothing lies between them.
    """
    steps: list[int] = []
    for key, share in [*(("ladder", rung) for rung in search.ladder), ("fraction", search.fraction)]:
        step = round(share * total)
        if step < 1:
            raise UserError(f"search.{key}: {share} of {total} steps is less than a step")
        if steps and step == steps[-1]:
            before = search.ladder[len(steps) - 1]
            raise UserError(
                f"search.{key}: {share} of {total} steps is step {step}, as is the rung before it, {before} of "
                f"search.ladder, so that it would halve nothing; leave that rung out, or train longer"
            )
        steps.append(step)
    return Milestones(tuple(steps[:-1]), steps[-1], total)
