"""Trials on several machines: workers under Ray train them, the driver alone writes the journal.

The driver is the process that runs the study. Each worker is a process of its own with devices of its own, which opens
the configuration once and trains a population. What passes between them is small: a trial's values one way, its score
the other. Checkpoints and metrics lie in the study's run directory, which all of them see.

Nothing here imports Ray when it is loaded; it comes with the extra ``distributed``.
"""

from __future__ import annotations

import importlib.util
import os

from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError


def is_distributed(search: SearchConfig) -> bool:
    """Whether trials train in workers instead of this process."""
    return search.workers > 1 or search.ray_address is not None


def check_distributed(search: SearchConfig) -> None:
    """Looks for what a study over workers needs on this machine, before anything is opened.

    Raises:
      UserError: Ray is not installed, or this process is one of several of a single run.
    """
    if not is_distributed(search):
        return
    if importlib.util.find_spec("ray") is None:
        raise UserError("search.workers: install the package with: pip install 'jaxtune[distributed]'")
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("JAXTUNE_DISTRIBUTED"):
        raise UserError(
            "search.workers: a study over workers has one driver; unset JAX_COORDINATOR_ADDRESS and "
            "JAXTUNE_DISTRIBUTED, which make this process one of several"
        )
