"""Asking the process that runs a study to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from jaxtune.errors import UserError
from jaxtune.files import Holder, has_open, lock_holder
from jaxtune.layout import RunFiles
from jaxtune.search.directory import study_directory

_PAUSE = 0.1  # seconds between two looks at the lock


def stop_study(
    run_dir: str | os.PathLike[str], *, timeout: float | int, on_asked: Callable[[Holder], None] = lambda holder: None
) -> tuple[Holder | None, bool]:
    """Asks the process that holds a study's lock to stop cleanly (``SIGTERM``) and waits until it has let go.

    Args:
      run_dir: the study's run directory.
      timeout: seconds to wait.
      on_asked: is told once the signal is sent.

    Returns:
      Who held the lock, None if nobody did; and whether nobody holds it now.

    Raises:
      UserError: there is no study, or the process that holds it runs elsewhere, is not the one that the lock's file
        names, or is another user's.
    """
    path = RunFiles(study_directory(run_dir)).study_lock_path
    holder = lock_holder(path)
    if holder is None:
        return None, True
    if holder.process is None:
        raise UserError(f"{path}: it does not tell which process holds it ({holder.text}); stop that one by hand")
    if not holder.here:
        raise UserError(f"{run_dir}: run by {holder.text}; stop it there: jaxtune study stop {run_dir}")
    ours = has_open(holder.process, path)
    if ours is None:
        raise UserError(
            f"{run_dir}: run by {holder.text}; whether that is still the process of this number cannot be seen here: "
            f"look, then end it with: kill -TERM {holder.process}"
        )
    if not ours:
        # Numbers are given anew: a signal to a stranger would be worse than none.
        raise UserError(
            f"{run_dir}: {path.name} names {holder.text}, but that process does not hold it; the study is run by a "
            f"process that cannot be seen from here (another container?): stop it there"
        )
    try:
        os.kill(holder.process, signal.SIGTERM)
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise UserError(f"{run_dir}: run by {holder.text}, a process of another user; ask them") from error
    on_asked(holder)
    end = time.monotonic() + timeout
    while (now := lock_holder(path)) is not None and now.process == holder.process and time.monotonic() < end:
        time.sleep(_PAUSE)
    return holder, now is None or now.process != holder.process
