"""What a process may be started without: open streams, an encoding that has every character, a home folder."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def make_streams_usable() -> None:
    """Opens closed standard streams on the null device, and lets characters that an encoding lacks be replaced.

    A file opened later would otherwise get the number of a closed stream, and what is printed would end in it; and a
    search that ran for hours would end in a dash that a terminal of 1990 does not have.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number: this one
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def make_home_usable() -> None:
    """Gives the process a home where the system knows none, in the folder for temporary files.

    Without one ``~/.cache`` is a folder named ``~`` in the working directory to some libraries, and an error to others.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(Path(tempfile.gettempdir()) / f"home-{os.getuid()}")
