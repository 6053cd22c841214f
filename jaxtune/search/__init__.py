"""The search: which configuration is worth finishing."""

from __future__ import annotations

from jaxtune.search.journal import Journal, read_journal
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import Interrupted, TrialRunner
from jaxtune.search.space import Space
from jaxtune.search.study import Study
from jaxtune.search.table import trials
from jaxtune.search.trial import Trial

__all__ = [
    "Interrupted",
    "Journal",
    "Outcome",
    "Space",
    "Study",
    "TestOutcome",
    "Trial",
    "TrialRunner",
    "read_journal",
    "trials",
]
