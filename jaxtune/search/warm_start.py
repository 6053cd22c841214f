"""A study that begins where another one ended: its best trials instead of a space-filling design.

Which configurations are good carries over between tasks that share a model, and from a small model or a part of the
data to the whole, better than any design guesses (docs/surrogates.md has the figures).
"""

from __future__ import annotations

import os
from typing import Any

from jaxtune.config.metrics import Goal
from jaxtune.errors import UserError, nearest
from jaxtune.layout import RunFiles
from jaxtune.search.directory import study_directory
from jaxtune.search.header import amended_header
from jaxtune.search.journal import read_journal
from jaxtune.search.space import Space
from jaxtune.search.trial import replay


def best_configurations(run_dir: str | os.PathLike[str], space: Space, count: int) -> list[dict[str, Any]]:
    """The best finished trials of a study that lie in a space, best first.

    Args:
      run_dir: of the study; it may have searched over more keys.
      space: of the study that is to begin.
      count: at most so many.

    Raises:
      UserError: there is no study, it did not search over a key of the space, or none of its finished trials lies in
        the space.
    """
    directory = study_directory(run_dir)
    path, records = RunFiles(directory).journal_path, read_journal(directory)
    header = amended_header(records, path)
    missing = [key for key in space.keys if key not in header["space"]]
    if missing:
        raise UserError(
            f"search.start_from: the study in {run_dir} did not search over {missing[0]}"
            f"{nearest(missing[0], header['space'])}"
        )
    goal = Goal.of(header["objective"])
    history = replay(records[1:], directory, path)
    finished = sorted(
        (goal.signed(state.final.score), number, state.trial.configuration)
        for number, state in history.trials.items()
        if number and state.finished and state.final is not None
    )
    points = [space.point(configuration) for _, _, configuration in finished]
    found = [space.configuration(space.snap(point)) for point in points if point is not None]
    if not found:
        raise UserError(
            f"search.start_from: of {len(finished)} finished trials in {run_dir} none lies in search.space; widen it, "
            f"or finish that study"
        )
    unique = [one for at, one in enumerate(found) if one not in found[:at]]
    return unique[:count]
