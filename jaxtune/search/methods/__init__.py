"""How a study chooses its trials: one interface, several methods (``search.method``)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtune.errors import UserError, nearest
from jaxtune.search.methods.gaussian_process import GaussianProcess
from jaxtune.search.methods.hyperband import Hyperband
from jaxtune.search.methods.protocol import Method
from jaxtune.search.methods.random_search import RandomSearch
from jaxtune.search.methods.sobol import Sobol
from jaxtune.search.methods.tpe import TreeParzen
from jaxtune.search.rules import RULES
from jaxtune.search.space import Space

__all__ = ["METHODS", "Method", "make_method"]

METHODS: dict[str, Callable[..., Method]] = {
    "gp": GaussianProcess,
    "random": RandomSearch,
    "sobol": Sobol,
    "tpe": TreeParzen,
    "hyperband": Hyperband,
}


def make_method(
    name: str, space: Space, *, seed: int, initial: int, acquisition: str = "ei", rules: int = RULES
) -> Method:
    """A search method by its name in the configuration.

    Args:
      name: one of ``METHODS``.
      space: the space.
      seed: of the study.
      initial: trials of the initial design, trial 0 (the reference) included.
      acquisition: what chooses among the candidates of ``gp``.
      rules: by which it proposes (:mod:`jaxtune.search.rules`).

    Raises:
      UserError: there is no such method, or its package is not installed.
    """
    if name not in METHODS:
        raise UserError(f"search.method: there is no method {name!r}{nearest(name, METHODS)}")
    return METHODS[name](space, seed=seed, initial=initial, acquisition=acquisition, rules=rules)
