"""The search: which configuration is worth finishing.

The names are imported when they are first used: what reads a study's files need not wait for what trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.search.journal import Journal, read_journal
    from jaxtune.search.outcome import Outcome, TestOutcome
    from jaxtune.search.results import StudySummary
    from jaxtune.search.run import search
    from jaxtune.search.runner import Interrupted, TrialRunner
    from jaxtune.search.space import Space
    from jaxtune.search.study import Study
    from jaxtune.search.table import trials
    from jaxtune.search.trial import Trial

_HOMES = {
    "Interrupted": "runner",
    "Journal": "journal",
    "Outcome": "outcome",
    "Space": "space",
    "Study": "study",
    "StudySummary": "results",
    "TestOutcome": "outcome",
    "Trial": "trial",
    "TrialRunner": "runner",
    "read_journal": "journal",
    "search": "run",
    "trials": "table",
}

__all__ = [
    "Interrupted",
    "Journal",
    "Outcome",
    "Space",
    "Study",
    "StudySummary",
    "TestOutcome",
    "Trial",
    "TrialRunner",
    "read_journal",
    "search",
    "trials",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxtune.search' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxtune.search.{_HOMES[name]}"), name)
