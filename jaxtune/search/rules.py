"""By which rules a study proposes its trials: a number in its journal, so that one that has begun keeps its own."""

from __future__ import annotations

TESTED_PRIORS = 2
"""From here on a belief that scores contradict is dropped (:mod:`jaxtune.search.prior`)."""

RULES = TESTED_PRIORS
"""Of a new study; one whose journal names none has 1."""
