"""Writing files that must survive a crash: a reader sees the old content or the new, never a part.

And what comes before writing: whether a place can be written to at all, and whether another process writes there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxtune.errors import UserError


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write in full; takes the place of ``path`` at once when the block ends well, and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content by ``text`` (UTF-8) in one move; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(text.encode("utf-8"))


def check_writable(path: str | Path, key: str) -> None:
    """Refuses a file or folder that could not be made, before hours of work end there. Writes nothing.

    Args:
      path: what is to be made.
      key: the option or configuration key that names it, for the message.

    Raises:
      UserError: a file stands in the way, or the folder is not ours to write in.
    """
    place = Path(path).expanduser().absolute()
    existing = next(part for part in (place, *place.parents) if os.path.lexists(part))
    if existing != place and not existing.is_dir():
        raise UserError(f"{key}: {path} cannot be made, as {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written: there is no permission to write to {existing}")


def acquire_lock(path: Path, what: str) -> int:
    """Takes a lock that the kernel drops when this process closes it or ends, however it ends.

    Args:
      path: the lock's file; made if missing, and left.
      what: what is locked, for the message: ``"study"``.

    Returns:
      The file's descriptor, to be closed.

    Raises:
      UserError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise UserError(f"{path.parent}: this {what} is being run by {holder}; stop that first, or wait") from error
    # The text is only for people: a stale one does no harm.
    os.ftruncate(descriptor, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
    return descriptor
