"""What a new study begins with where its configuration leaves it unset: what was best on development landscapes.

docs/surrogates.md has the comparison. A study that has begun goes on with what its journal says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.milestones import Shares

UNSET = ("acquisition", "finish", "promote_by")
"""Settings that a new study is given."""

RUNGS = (0.4, 1.0)

Total = Callable[[Mapping[str, Any]], int]
"""The steps of a trial with some overrides."""


def beginning(search: SearchConfig, shortest: Callable[[], int]) -> dict[str, Any]:
    """What a new study has for each of :data:`UNSET` where nothing is said.

    Args:
      search: as configured.
      shortest: tells the steps of the shortest trial; asked only if it matters.
    """
    return {
        "acquisition": "thompson",
        "finish": [*RUNGS] if why_straight(search, shortest) is None else [1.0],
        # Methods that stop trials on the way were compared with promotion by mean alone.
        "promote_by": "mean" if _stops(search) else "score",
    }


def why_straight(search: SearchConfig, shortest: Callable[[], int]) -> str | None:
    """Why the best trials of a new study go straight to the end where ``search.finish`` is unset; None if they do not.

    Args:
      search: as configured.
      shortest: tells the steps of the shortest trial; asked only if nothing else is in the way.
    """
    if (stops := _stops(search)) is not None:
        return f"{stops} stops trials on the way already"
    if search.fraction >= RUNGS[0]:
        return f"search.fraction {search.fraction:g} leaves no rung at {RUNGS[0]:g}"
    if search.promote == 1:
        return "of one promoted trial (search.promote) there is no better half"
    total = shortest()
    try:
        Shares((), search.fraction, RUNGS).checked(total)
    except UserError:
        return f"a trial of {total} steps has no step of its own for a rung at {RUNGS[0]:g}"
    return None


def _stops(search: SearchConfig) -> str | None:
    """What stops trials before the fraction; None where nothing does."""
    if search.ladder:
        return "search.ladder"
    return f"search.method {search.method}" if search.method == "hyperband" else None
