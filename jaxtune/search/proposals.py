"""Proposals made beside the training: the next one is there when a place is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxtune.search.methods import Method
from jaxtune.search.observation import Observation, Proposal
from jaxtune.search.space import Point


@dataclass(frozen=True)
class Request:
    """What a proposal may know, copied so that a thread can work on it.

    Attributes:
      trial: the number of the trial to propose.
      told: scored trials by number, in its order.
      pending: points of trials without a score, by number.
    """

    trial: int
    told: list[tuple[int, Observation]]
    pending: list[tuple[int, Point]]


@dataclass(frozen=True)
class Proposed:
    """A proposal and what it was made of."""

    request: Request
    proposal: Proposal

    def fields(self) -> dict[str, Any]:
        """As fields of a journal record; a proposal that learnt from nothing was told nothing."""
        learnt = self.proposal.source == "surrogate"
        return {
            "trial": self.request.trial,
            "configuration": self.proposal.configuration,
            "source": self.proposal.source,
            "told": [number for number, _ in self.request.told] if learnt else [],
            "pending": [number for number, _ in self.request.pending] if learnt else [],
        }


class Proposals:
    """Asks a method for trials, one ahead.

    Args:
      method: proposes; called from one thread at a time.
      reference: the configuration of trial 0.
      start: the configurations of the trials that follow it, whatever the method says.
    """

    def __init__(self, method: Method, reference: Mapping[str, Any], start: Sequence[Mapping[str, Any]] = ()):
        self._method, self._reference, self._start = method, dict(reference), [dict(one) for one in start]
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="surrogate")
        self._ahead: tuple[int, Future[Proposed]] | None = None

    def prepare(self, request: Request) -> None:
        """Begins to work on the trial that will be asked for next, unless that is under way."""
        if self._ahead is None:
            self._ahead = request.trial, self._pool.submit(self._compute, request)

    def take(self, request: Request) -> Proposed:
        """The proposal of the next trial: the one prepared, or else made now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return self._compute(request)
        assert ahead[0] == request.trial, "another trial was prepared"
        return ahead[1].result()

    def _compute(self, request: Request) -> Proposed:
        if request.trial == 0:
            return Proposed(request, Proposal(self._reference, "reference"))
        if request.trial <= len(self._start):
            return Proposed(request, Proposal(self._start[request.trial - 1], "transfer"))
        told, pending = [seen for _, seen in request.told], [point for _, point in request.pending]
        return Proposed(request, self._method.propose(request.trial, told, pending))

    def __enter__(self) -> Proposals:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
