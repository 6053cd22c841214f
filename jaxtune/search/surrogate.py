"""The Gaussian process that proposes trials and weighs noisy early scores (scikit-optimize).

A proposal follows from the study's seed, the trial's number, the scores told and the trials still pending alone, so a
study that was killed proposes what it would have proposed. The fitted process, which follows from the scores told, is
kept for the next proposal that is told the same: those of one round share it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxtune.search.acquisition import ACQUISITIONS, believed
from jaxtune.search.candidates import TakenPoints, design, random_point, random_state, taken_points, untaken
from jaxtune.search.observation import Observation, Proposal, finite_scores
from jaxtune.search.prior import Prior
from jaxtune.search.rules import RULES, TESTED_PRIORS
from jaxtune.search.space import Point, Space
from jaxtune.search.warp import Warp

if TYPE_CHECKING:
    from skopt.learning import GaussianProcessRegressor

# The acquisition is evaluated at so many points around the leading told ones: that share of them, this many at least.
_CANDIDATES = 300
_LEADING, _FEWEST_LEADING = 0.25, 2
# A candidate differs from its centre in this share of its normalised coordinates, by this standard deviation.
_MOVED, _WIDTH = 0.6, 0.2
# Fewer scores than this say nothing about the length scales.
_FEWEST_SCORES = 3


def _limits():
    """One BLAS thread: matrices are small, the trainer wants the cores, and sums keep one order on every machine."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1)


def _maximum_a_posteriori(objective, initial, bounds):
    """L-BFGS on the marginal likelihood times a log-normal prior, for scikit-learn's ``optimizer`` argument.

    With a handful of scores the likelihood alone is happy with any length scale; the prior (kernel parameters are in
    logarithms: amplitude, one length scale per column, noise) keeps unneeded columns smooth.
    """
    from scipy.optimize import minimize

    columns = len(initial) - 2
    centre = np.concatenate([[0.0], np.full(columns, np.log(0.5 * np.sqrt(columns))), [np.log(0.05)]])
    width = np.concatenate([[1.0], np.full(columns, 1.0), [1.5]])

    def penalised(theta):
        value, gradient = objective(theta)
        standard = (theta - centre) / width
        return value + 0.5 * float(standard @ standard), gradient + standard / width

    result = minimize(penalised, initial, method="L-BFGS-B", jac=True, bounds=bounds)
    return result.x, result.fun


def _regressor(columns: int, seed: int) -> GaussianProcessRegressor:
    """An unfitted Gaussian process: amplitude times Matérn 5/2 with a length scale per column, plus estimated noise."""
    from skopt.learning import GaussianProcessRegressor
    from skopt.learning.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    # scikit-optimize's annotations name only the scalar forms of arguments that scikit-learn takes in others too.
    scales: Any = np.full(columns, 0.5 * np.sqrt(columns))
    optimizer: Any = _maximum_a_posteriori
    matern = Matern(length_scale=scales, length_scale_bounds=[(0.05, 20.0)] * columns, nu=2.5)
    kernel = ConstantKernel(1.0, (0.05, 20.0)) * matern + WhiteKernel(0.05, (1e-4, 1.0))
    # The kernel holds its own WhiteKernel; noise="gaussian" tells scikit-optimize to leave it out of predictions.
    return GaussianProcessRegressor(
        kernel=kernel,
        noise="gaussian",
        normalize_y=False,
        optimizer=optimizer,
        n_restarts_optimizer=1,
        random_state=seed,
    )


@dataclass(frozen=True)
class Posterior:
    """The Gaussian process fitted to all scores of a study.

    Attributes:
      space: the space.
      warp: between scores (lower is better) and what the process sees.
      model: the fitted process.
      transformed: the space as scikit-optimize normalises it.
    """

    space: Space
    warp: Warp
    model: Any
    transformed: Any

    def predict(self, points: Sequence[Point]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]]:
        """Mean and covariance of the noise-free warped score at ``points``."""
        return self.model.predict(self.columns(points), return_cov=True)

    def columns(self, points: Sequence[Point]) -> Float[np.ndarray, "n columns"]:
        """Points in normalised coordinates."""
        return np.asarray(self.transformed.transform([list(point) for point in points]), np.float64)

    def snap(self, columns: Float[np.ndarray, "n columns"]) -> list[Point]:
        """The points of the space nearest to normalised coordinates."""
        return [self.space.snap(point) for point in self.transformed.inverse_transform(columns)]

    def believing(self, points: Sequence[Point], warped: float) -> GaussianProcessRegressor:
        """The process with the same kernel and noise, told as well that ``points`` scored ``warped``."""
        from sklearn.base import clone

        if not points:
            return self.model
        # What was fitted, with the noise that scikit-optimize takes out of the kernel for predictions.
        kernel: Any = clone(self.model.kernel_)
        kernel.set_params(k2__noise_level=self.model.noise_)
        model: Any = clone(self.model)
        model.set_params(kernel=kernel, optimizer=None)
        columns = np.concatenate([self.model.X_train_, self.columns(points)])
        return model.fit(columns, np.concatenate([self.model.y_train_, np.full(len(points), warped)]))


class Surrogate:
    """Proposes points of a space.

    The acquisition (:mod:`jaxtune.search.acquisition`) sees warped and standardised scores; pending trials are told the
    best score so far (the constant liar ``cl_min``, Ginsbourger et al. 2010). Noise is one estimated variance: all
    trials are scored on the same validation set, so their standard errors are nearly equal and mostly shared, and as
    noise per observation they would drown the differences that the search is after.

    Args:
      space: the space.
      seed: of the study.
      initial: trials of the initial design, trial 0 (the reference) included.
      acquisition: what chooses among the candidates, a name of ``ACQUISITIONS``.
      rules: by which it proposes (:mod:`jaxtune.search.rules`).
    """

    def __init__(self, space: Space, *, seed: int, initial: int, acquisition: str = "ei", rules: int = RULES):
        self.space = space
        self.seed = seed
        self.initial = initial
        self._acquisition, self._prior, self._rules = ACQUISITIONS[acquisition], Prior.of(space), rules
        self._design: list[Point] | None = None
        self._last: tuple[list[Observation], Posterior] | None = None

    def design(self) -> list[Point]:
        """The space-filling design for trials 1 … initial - 1."""
        if self._design is None:
            self._design = design(self.space, seed=self.seed, count=self.initial - 1)
        return self._design

    def propose(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Proposal:
        """The configuration of trial ``trial`` (1 or above), new to ``told`` and ``pending``.

        Args:
          trial: its number, which picks the random stream and, early on, the point of the design.
          told: scored and diverged trials, in the order of their numbers.
          pending: points of trials that have no score yet.

        Raises:
          ValueError: every configuration of a finite space has been tried.
        """
        taken = taken_points(told, pending)
        point, source = None, "random"
        dropped = self._dropped(told) if trial >= self.initial else None
        if trial < self.initial:
            point, source = self.design()[trial - 1], "design"
        elif any(observation.score is not None for observation in told):
            point, source = self._improve(trial, told, pending), "surrogate"
        if point is None or tuple(point) in taken:
            point = random_point(self._where(dropped), taken, seed=self.seed, trial=trial)
        return Proposal(self.space.configuration(point), source, prior_dropped=dropped)

    def _dropped(self, told: Sequence[Observation]) -> int | None:
        """The number of scores that made it drop the belief; None where there is none, or it still holds."""
        if self._prior is None or self._rules < TESTED_PRIORS or all(one.score is None for one in told):
            return None
        # Of several objectives the first, whatever they weigh in this proposal.
        first = [
            replace(one, score=one.objectives[0]) if one.objectives and one.score is not None else one for one in told
        ]
        return self._prior.contradicted([one.point for one in first], finite_scores(first))

    def _where(self, dropped: int | None) -> Space:
        """The space to draw from, whose priors count for as long as they are believed."""
        return self.space if dropped is None else self.space.without_priors()

    def _improve(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> Point:
        """The candidate that the acquisition values most."""
        dropped = self._dropped(told)
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = self._fitted(told)
            lie = float(posterior.model.y_train_.min())
            model = posterior.believing(pending, lie)

            points = self._candidates(trial, posterior, taken_points(told, pending), self._where(dropped))
            # What scikit-optimize returns depends on the flags.
            predicted: Any = model.predict(posterior.columns(points), return_std=True)
            mean, deviation = predicted
            worth = self._acquisition(mean, deviation, lie, np.random.default_rng((self.seed, trial, 3)))
            if self._prior is not None and dropped is None:
                worth = believed(self._acquisition, worth, self._prior.factor(points, len(told)))
            return points[int(np.argmax(worth))]

    def gain(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> tuple[float, float] | None:
        """What a trial is expected to gain at most, and the noise it would have to stand out from.

        The largest expected improvement over the best posterior mean of the told points, and the standard deviation of
        that point's score as :meth:`promotion_estimates` takes it; both in units of the score, by the slope of the warp
        there. A search whose gain is below the noise ends (after Makarova et al. 2022, who compare a bound on the
        regret with the deviation of cross-validated scores).

        Returns:
          Gain and noise; None where too few scores are finite.
        """
        posterior = self.fit(told)
        if posterior is None:
            return None
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            space = self._where(self._dropped(told))
            candidates = self._candidates(trial, posterior, taken_points(told, pending), space)
            known = posterior.model.predict(posterior.columns([one.point for one in told]))
            mean, deviation = posterior.model.predict(posterior.columns(candidates), return_std=True)
        at = int(np.argmin(known))
        best, slope = told[at], float(posterior.warp.slope(finite_scores(told))[at])
        noise = math.sqrt(posterior.model.noise_)
        if best.score is not None and best.standard_error is not None:
            noise = min(noise, best.standard_error * slope)
        gain = ACQUISITIONS["ei"](mean, deviation, float(known[at]), np.random.default_rng(0)).max()
        return float(gain) / slope, noise / slope

    def _candidates(self, trial: int, posterior: Posterior, taken: TakenPoints, space: Space) -> list[Point]:
        """New points near the best told ones, and a few anywhere.

        Expected improvement over the whole space goes to its corners while there are few scores: there are many of
        them, and nothing is known there.
        """
        generator = np.random.default_rng((self.seed, trial, 2))
        columns, warped = posterior.model.X_train_, posterior.model.y_train_
        leading = max(_FEWEST_LEADING, math.ceil(_LEADING * len(warped)))
        best = columns[np.argsort(warped, kind="stable")[:leading]]
        near = best[generator.integers(len(best), size=_CANDIDATES)]
        moved = near + _WIDTH * generator.standard_normal(near.shape)
        near = np.where(generator.random(near.shape) < _MOVED, moved, near)
        # A coordinate that leaves the space is drawn anew.
        near = np.where((near < 0) | (near > 1), generator.random(near.shape), near)
        anywhere = untaken(space, taken, seed=self.seed, trial=trial, count=_CANDIDATES // leading)
        return anywhere + [point for point in posterior.snap(near) if tuple(point) not in taken]

    def fit(self, observations: Sequence[Observation]) -> Posterior | None:
        """The process given all scores; None where too few are finite to fit one."""
        if sum(observation.score is not None for observation in observations) < _FEWEST_SCORES:
            return None
        return self._fitted(observations)

    def _fitted(self, observations: Sequence[Observation]) -> Posterior:
        """The process given scores of which one at least is finite; that of the last call where they are the same."""
        from skopt.space import Space as SkoptSpace
        from skopt.utils import normalize_dimensions

        told, last = list(observations), self._last
        if last is not None and last[0] == told:
            return last[1]
        scores = finite_scores(told)
        warp = Warp.fit(scores)
        transformed = SkoptSpace(normalize_dimensions(self.space.to_skopt()))
        model = _regressor(transformed.transformed_n_dims, random_state(self.seed, 0))
        posterior = Posterior(self.space, warp, model, transformed)
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a length scale at its bound is no news with few scores
            model.fit(posterior.columns([one.point for one in told]), warp.forward(scores))
        self._last = told, posterior
        return posterior

    def promotion_estimates(self, observations: Sequence[Observation]) -> Float[np.ndarray, " n"] | None:
        """What each scored trial is worth, in units of the score; None where no process can be fitted.

        The posterior mean at each trial's own point, ``K (K + D)⁻¹ w`` on the warped scale (Rasmussen & Williams 2006,
        eq. 2.25), where the noise ``D`` of a trial is the variance that the process estimated, but never more than its
        squared standard error: what is promoted is that very checkpoint, whose score is uncertain only by the
        validation set. So exact scores keep their own order, and a noisy one is drawn towards its neighbours'.
        """
        posterior = self.fit(observations)
        if posterior is None:
            return None
        scores = finite_scores(observations)
        warped = posterior.warp.forward(scores)
        noise = np.full(len(scores), posterior.model.noise_)
        slopes = posterior.warp.slope(scores)
        for index, observation in enumerate(observations):
            if observation.score is not None and observation.standard_error is not None:
                noise[index] = min(noise[index], (observation.standard_error * slopes[index]) ** 2)
        kernel = posterior.model.kernel_(posterior.columns([observation.point for observation in observations]))
        with _limits():
            solved = np.linalg.solve(kernel + np.diag(noise + 1e-10), warped)
        return posterior.warp.inverse(kernel @ solved)
