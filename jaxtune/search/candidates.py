"""Points that need no model: the initial design, and untried points; the same for every search method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtune.search.observation import Observation
from jaxtune.search.prior import Prior
from jaxtune.search.space import Point, Space

# A finite space up to this size is listed in full when a new point is needed.
_LISTED = 5_000

TakenPoints = set[tuple[Any, ...]]


def random_state(seed: int, trial: int) -> int:
    """The 31-bit seed of one trial's random stream; trial 0 stands for the study as a whole."""
    return int(np.random.SeedSequence((seed, trial)).generate_state(1)[0] >> 1)


def taken_points(told: Sequence[Observation], pending: Sequence[Point]) -> TakenPoints:
    """The points that some trial has."""
    return {tuple(observation.point) for observation in told} | {tuple(point) for point in pending}


def design(space: Space, *, seed: int, count: int) -> list[Point]:
    """``count`` points that fill the space: a Latin hypercube that spreads them (maximin).

    Where keys have priors it fills the belief instead, and its first point is the prior itself.
    """
    from skopt.sampler import Lhs
    from skopt.space import Space as SkoptSpace

    if count < 1:
        return []
    sampler = Lhs(criterion="maximin", iterations=200)
    prior = Prior.of(space)
    if prior is not None:
        unit = SkoptSpace([(0.0, 1.0)] * len(space.dimensions)).dimensions
        return prior.design(np.asarray(sampler.generate(unit, count, random_state=random_state(seed, 0)), np.float64))
    dimensions = SkoptSpace(space.to_skopt()).dimensions
    points: Any = sampler.generate(dimensions, count, random_state=random_state(seed, 0))
    return [space.snap(point) for point in points]


def untaken(space: Space, taken: TakenPoints, *, seed: int, trial: int, count: int) -> list[Point]:
    """Points that no trial has, shuffled: all of a small space, at most ``count`` random ones of a large one.

    Where keys have priors the likely ones come first, or are drawn more often.

    Raises:
      ValueError: every configuration of a finite space has been tried.
    """
    size, prior = space.size, Prior.of(space)
    generator = np.random.default_rng((seed, trial, 1))
    if size is not None and size <= _LISTED:
        free = [point for point in space.points() if tuple(point) not in taken]
        if not free:
            raise ValueError(f"all {size} configurations of the space have been tried")
        if prior is not None:
            return prior.order(generator, free, trial)
        generator.shuffle(free)
        return free
    if prior is not None:
        free = []
        # A belief may hold much of its mass in a few points, which are all taken.
        while not free:
            free = [point for point in prior.draw(generator, count, trial) if tuple(point) not in taken]
        return free
    from skopt.space import Space as SkoptSpace

    state = np.random.RandomState(generator.integers(2**31))
    sample = SkoptSpace(space.to_skopt()).rvs(count, random_state=state)
    return [point for point in map(space.snap, sample) if tuple(point) not in taken]


def random_point(space: Space, taken: TakenPoints, *, seed: int, trial: int) -> Point:
    """A random point that no trial has.

    Raises:
      ValueError: every configuration of a finite space has been tried.
    """
    # One more draw than there are points to miss: enough where two draws of a large space never coincide.
    return untaken(space, taken, seed=seed, trial=trial, count=len(taken) + 1)[0]
