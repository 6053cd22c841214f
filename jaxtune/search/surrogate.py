"""The Gaussian process that proposes trials and weighs noisy early scores (scikit-optimize).

Nothing is kept between two proposals: each one is computed afresh from the study's seed, the trial's number, the scores
told and the trials still pending, so a study that was killed proposes what it would have proposed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxtune.search.candidates import design, random_point, random_state, taken_points, untaken
from jaxtune.search.observation import Observation, Proposal, finite_scores
from jaxtune.search.space import Point, Space
from jaxtune.search.warp import Warp

if TYPE_CHECKING:
    from skopt.learning import GaussianProcessRegressor

# Points at which the acquisition is evaluated before its best ones are refined by L-BFGS.
_CANDIDATES = 4000
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
        return self.model.predict(self.transformed.transform([list(point) for point in points]), return_cov=True)


@dataclass(frozen=True)
class _Fitted:
    """A fitted process, the normalised space it works in, and the best warped score."""

    model: Any
    transformed: Any
    best: float

    def expected_improvement(self, points: Sequence[Point]) -> np.ndarray:
        from skopt.acquisition import gaussian_ei

        columns = self.transformed.transform([list(point) for point in points])
        return np.asarray(gaussian_ei(columns, self.model, self.best))


class Surrogate:
    """Proposes points of a space.

    The acquisition is expected improvement (Jones et al. 1998) on warped and standardised scores; pending trials are
    told the best score so far (the constant liar ``cl_min``, Ginsbourger et al. 2010). Noise is one estimated
    variance: all trials are scored on the same validation set, so their standard errors are nearly equal and mostly
    shared, and as noise per observation they would drown the differences that the search is after.

    Args:
      space: the space.
      seed: of the study.
      initial: trials of the initial design, trial 0 (the reference) included.
    """

    def __init__(self, space: Space, *, seed: int, initial: int):
        self.space = space
        self.seed = seed
        self.initial = initial

    def design(self) -> list[Point]:
        """The space-filling design for trials 1 … initial - 1."""
        return design(self.space, seed=self.seed, count=self.initial - 1)

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
        fitted: _Fitted | None = None
        source = "random"
        point: Point | None = None
        if trial < self.initial:
            point, source = self.design()[trial - 1], "design"
        elif any(observation.score is not None for observation in told):
            source = "surrogate"
            with _limits():
                point, fitted = self._improve(trial, told, pending)
        if point is None or tuple(point) in taken:
            if fitted is None:
                point = random_point(self.space, taken, seed=self.seed, trial=trial)
            else:
                candidates = untaken(self.space, taken, seed=self.seed, trial=trial, count=_CANDIDATES)
                with _limits():
                    point = candidates[int(np.argmax(fitted.expected_improvement(candidates)))]
        return Proposal(self.space.configuration(point), source)

    def _improve(self, trial: int, told: Sequence[Observation], pending: Sequence[Point]) -> tuple[Point, _Fitted]:
        """The point of largest expected improvement, and what it was found with."""
        from skopt import Optimizer
        from skopt.space import Space as SkoptSpace
        from skopt.utils import normalize_dimensions

        scores = finite_scores(told)
        warped = Warp.fit(scores).forward(scores)
        lie = float(warped.min())
        seed = random_state(self.seed, trial)
        dimensions = self.space.to_skopt()
        columns = SkoptSpace(normalize_dimensions(self.space.to_skopt())).transformed_n_dims
        optimizer = Optimizer(
            dimensions,
            base_estimator=_regressor(columns, seed),  # type: ignore[arg-type]
            n_initial_points=0,
            acq_func="EI",
            acq_optimizer="lbfgs",
            acq_optimizer_kwargs={"n_points": _CANDIDATES},
            random_state=seed,
            avoid_duplicates=False,
        )
        points = [list(observation.point) for observation in told] + [list(point) for point in pending]
        values = [*(float(value) for value in warped), *([lie] * len(pending))]
        with warnings.catch_warnings():
            # A repeated point is dealt with by the caller, and a length scale at its bound is no news with few scores.
            warnings.simplefilter("ignore")
            optimizer.tell(points, values)
            point = self.space.snap(optimizer.ask() or [])
        return point, _Fitted(optimizer.models[-1], optimizer.space, lie)

    def fit(self, observations: Sequence[Observation]) -> Posterior | None:
        """The process given all scores; None where too few are finite to fit one."""
        from skopt.space import Space as SkoptSpace
        from skopt.utils import normalize_dimensions

        if sum(observation.score is not None for observation in observations) < _FEWEST_SCORES:
            return None
        scores = finite_scores(observations)
        warp = Warp.fit(scores)
        transformed = SkoptSpace(normalize_dimensions(self.space.to_skopt()))
        model = _regressor(transformed.transformed_n_dims, random_state(self.seed, 0))
        with _limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a length scale at its bound is no news with few scores
            model.fit(transformed.transform([list(o.point) for o in observations]), warp.forward(scores))
        return Posterior(self.space, warp, model, transformed)

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
        points = posterior.transformed.transform([list(observation.point) for observation in observations])
        kernel = posterior.model.kernel_(points)
        with _limits():
            solved = np.linalg.solve(kernel + np.diag(noise + 1e-10), warped)
        return posterior.warp.inverse(kernel @ solved)
