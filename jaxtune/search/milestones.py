"""The steps at which a trial is looked at, from the shares of its steps that a search names: rounded here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.finishing import promotions


@dataclass(frozen=True)
class Milestones:
    """Steps of one trial, ascending.

    Attributes:
      rungs: of the ladder, where the worse half is stopped.
      early: at the fraction, where it is scored.
      total: its end.
      finish: rungs between these two, at each of which the better ones go on.
    """

    rungs: tuple[int, ...]
    early: int
    total: int
    finish: tuple[int, ...] = ()

    @property
    def legs(self) -> tuple[int, ...]:
        """Where trials go that are promoted: the rungs after the fraction, and the end."""
        return (*self.finish, self.total)

    @property
    def steps(self) -> tuple[int, ...]:
        """All of them; a fraction of 1 is the end."""
        return tuple(dict.fromkeys((*self.rungs, self.early, *self.legs)))

    def after(self, step: int) -> int:
        """The next one after ``step``; the end where there is none."""
        return next((at for at in self.steps if at > step), self.total)


@dataclass(frozen=True)
class Shares:
    """Shares of a trial's steps.

    Attributes:
      ladder: where the worse half is stopped.
      fraction: where it is scored.
      finish: where it goes if it is promoted; the last one is 1.
    """

    ladder: tuple[float, ...]
    fraction: float
    finish: tuple[float, ...] = (1.0,)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Shares:
        """Of a search's settings, by their names in the configuration and in a journal's first record."""
        finish = tuple(settings.get("finish") or (1.0,))
        return cls(tuple(settings.get("ladder") or ()), settings["fraction"], finish)

    def steps(self, total: int) -> Milestones:
        """The milestones of a trial of ``total`` steps, as they fall."""
        rungs, finish = (tuple(step_at(share, total) for share in shares) for shares in (self.ladder, self.finish[:-1]))
        return Milestones(rungs, step_at(self.fraction, total), total, finish)

    def checked(self, total: int) -> Milestones:
        """The milestones of a trial of ``total`` steps.

        Raises:
          UserError: one of them is less than a step, or the same step as the one before, so that nothing lies between
            them.
        """
        named = [*(("search.ladder", share) for share in self.ladder), ("search.fraction", self.fraction)]
        if len(self.finish) > 1:
            named += [("search.finish", share) for share in self.finish]
        distinct_steps(named, total)
        return self.steps(total)

    def promotions(self, promote: int) -> tuple[int, ...]:
        """How many trials are to go on to each share of ``finish``, besides the reference.

        Args:
          promote: trials that would be finished if they went straight to the end.
        """
        return promotions(promote, self.fraction, self.finish)


def step_at(share: float, total: int) -> int:
    """The step nearest to a share of ``total`` steps."""
    return round(share * total)


def distinct_steps(shares: Sequence[tuple[str, float]], total: int) -> list[int]:
    """The steps of ascending shares, each with the name of its key.

    Raises:
      UserError: one of them is less than a step, or the same step as the one before.
    """
    steps: list[int] = []
    for place, (key, share) in enumerate(shares):
        step = step_at(share, total)
        if step < 1:
            raise UserError(f"{key}: {share:g} of {total} steps is less than a step; raise it, or train longer")
        if steps and step == steps[-1]:
            before_key, before = shares[place - 1]
            raise UserError(
                f"{key}: {share:g} of {total} steps is step {step}, as is the rung before it, {before:g} of "
                f"{before_key}, so that nothing lies between them; leave that rung out, or train longer"
            )
        steps.append(step)
    return steps


def milestones(search: SearchConfig, total: int) -> Milestones:
    """The milestones of a trial of ``total`` steps, checked; see :class:`Shares`.

    Raises:
      UserError: one of them is less than a step, or the same step as the one before.
    """
    return Shares.of(search.model_dump()).checked(total)
