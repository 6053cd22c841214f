"""Writing files that must survive a crash: a reader sees the old content or the new, never a part.

And what comes before writing: whether a place can be written to at all, and whether another process writes there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxtune.errors import UserError
from jaxtune.remote_paths import local_path


def user_path(path: str) -> str:
    """A path as a user gave it, with ``~`` and ``~name`` in front turned into the folder that they stand for.

    Every path of the configuration and of the command line comes through here once, so that what is checked is what is
    used. (A shell does it for a word that begins with ``~``, and not for ``run_dir=~/runs`` or ``--peft=~/adapter``.)

    Raises:
      UserError: there is no such user, or it is a URL.
    """
    expanded = os.path.expanduser(local_path(path))
    if expanded.startswith("~"):
        raise UserError(f"{path}: there is no user {expanded.split('/')[0][1:]!r}; a file of that name is ./{path}")
    return expanded


_DESCRIPTOR = re.compile(r"/dev/(?:(stdin|stdout|stderr)|fd/(\d+))|/proc/self/fd/(\d+)")
_STANDARD = ("stdin", "stdout", "stderr")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write in full; takes the place of ``path`` at once when the block ends well, and vanishes otherwise.

    Of a link the file that it points to is replaced, and the link stays. What is no file (``/dev/null``, a pipe, a
    descriptor such as ``/dev/stdout``) cannot be replaced: it is written to.
    """
    if stream := _stream(path):
        with stream as file:
            yield file
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    # A name may be as long as the file system takes; its beginning is enough to tell what a torn file was to be.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.part")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block an error of the system names the file: one of an open file does not by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_or_nothing(directory: Path) -> Iterator[None]:
    """Removes a directory, which was missing or empty before, where the block that fills it does not end well."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


@contextlib.contextmanager
def replaced_directory(directory: Path, *, write: bool = True) -> Iterator[Path]:
    """A folder to fill, which then takes the place and the name of ``directory``: whoever finds that finds all of it.

    Args:
      directory: which may be there; it stays as it is where the block does not end well.
      write: whether this process is the one that moves it.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
    except BaseException:
        if write:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if write:
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)


def _stream(path: Path) -> BinaryIO | None:
    """What is no file, open to be written to; None for a file, or where there is nothing yet."""
    if named := _DESCRIPTOR.fullmatch(str(path)):
        number = _STANDARD.index(named[1]) if named[1] else int(named[2] or named[3])
        # Opened by its name, a file that the shell sends the output to would be cut off and written from its start.
        return os.fdopen(os.dup(number), "wb")
    if path.exists() and not path.is_file() and not path.is_dir():
        return open(path, "wb")
    return None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content by ``text`` (UTF-8) in one move; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(text.encode("utf-8"))


def check_writable(path: str | Path, key: str) -> None:
    """Refuses a file or folder that could not be made, before hours of work end there. Leaves nothing.

    Args:
      path: what is to be made.
      key: the option or configuration key that names it, for the message.

    Raises:
      UserError: a file stands in the way, the folder is not ours to write in, or a name is too long or no UTF-8.
    """
    place = Path(path).absolute()
    try:
        str(place).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{key}: {str(place)!r} is no UTF-8 text; choose another place, or rename the folder"
        ) from error
    existing = next(part for part in (place, *place.parents) if os.path.lexists(part))
    longest = os.pathconf(existing, "PC_NAME_MAX")
    if long := next((part for part in place.parts if len(part.encode()) > longest), None):
        raise UserError(f"{key}: {long[:20]}… is a name of {len(long.encode())} bytes; {existing} takes {longest}")
    if existing != place and not existing.is_dir():
        raise UserError(f"{key}: {path} cannot be made, as {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written: {_why_not(existing)}")
    if existing.is_dir():
        # The super-user has every permission, and still no file in what can only be read, or in /proc.
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError as error:
            reason = f"no file can be made in {existing} ({error.strerror})"
            raise UserError(f"{key}: {path} cannot be written: {reason}") from error


def _why_not(existing: Path) -> str:
    """Why something cannot be written to."""
    read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
    return f"{existing} can only be read" if read_only else f"there is no permission to write to {existing}"


def cache_directory() -> Path:
    """Where what can be made again is kept: ``jaxtune`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    A variable that is empty or names no absolute path counts as not set, as the XDG specification has it.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "jaxtune"


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the lock's file tells.

    Attributes:
      text: what people are told: ``process 17 on node3, started 2026-01-31 10:20:30+01:00``.
      process: its id; None where the text does not tell.
      host: the machine that it runs on; None where the text does not tell.
      started: when it took the lock, in seconds since 1970; None where the text does not tell.
    """

    text: str
    process: int | None = None
    host: str | None = None
    started: float | None = None

    @property
    def here(self) -> bool:
        """Whether it runs on this machine."""
        return self.host == socket.gethostname()


_HOLDER = re.compile(r"process (\d+) on (\S+), started (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d([+-]\d\d:\d\d)?)")
# How often and how long (in seconds) a lock is tried for: a reader that looks who holds it has it for an instant.
_TRIES, _PAUSE = 5, 0.05


def acquire_lock(path: Path, what: str, advice: str = "stop that first, or wait") -> int:
    """Takes a lock that the kernel drops when this process closes it or ends, however it ends.

    Args:
      path: the lock's file; made if missing, and left.
      what: what is locked, for the message: ``"study"``.
      advice: what to do where another process holds it, for the message.

    Returns:
      The file's descriptor, to be closed.

    Raises:
      UserError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for attempt in range(1, _TRIES + 1):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if attempt < _TRIES:
                time.sleep(_PAUSE)
                continue
            holder = _read_holder(descriptor).text
            os.close(descriptor)
            raise UserError(f"{path.parent}: this {what} is being run by {holder}; {advice}") from error
    # The text is only for people: a stale one does no harm.
    os.ftruncate(descriptor, 0)
    # With its zone: the machine that reads it may stand in another one.
    started = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with naming(path):
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
    return descriptor


def lock_holder(path: Path) -> Holder | None:
    """Who holds a lock now; None where nobody does. Changes nothing.

    Raises:
      UserError: the lock's file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _read_holder(descriptor: int) -> Holder:
    text = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    found = _HOLDER.fullmatch(text)
    if found is None:
        return Holder(text or "another process")
    # A time without a zone, as was written once, is taken as one of this machine's.
    return Holder(text, int(found[1]), found[2], datetime.datetime.fromisoformat(found[3]).timestamp())


def has_open(process: int, path: Path) -> bool | None:
    """Whether a process of this machine has a file open; None where the system does not tell (it has no ``/proc``)."""
    descriptors = Path("/proc") / str(process) / "fd"
    if not Path("/proc/self/fd").is_dir():
        return None
    wanted = path.stat()
    try:
        entries = list(descriptors.iterdir())
    except FileNotFoundError:
        return False
    except PermissionError:
        return None
    for entry in entries:
        with contextlib.suppress(OSError):
            found = entry.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False
