"""What notebooks show while something trains."""

from __future__ import annotations

import dataclasses
import html
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.progress import TaskID

_SECONDS_BETWEEN_DRAWINGS = 0.2


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, which shows HTML; a terminal's IPython is none."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@dataclasses.dataclass
class _Bar:
    title: str
    total: int
    completed: int
    metrics: str


class NotebookBars:
    """Bars in the output of a notebook's cell; what :class:`rich.progress.Progress` is on a terminal.

    (Rich draws them in notebooks through ipywidgets, which jaxtune does not ask for.)
    """

    def __init__(self) -> None:
        self._bars: dict[TaskID, _Bar] = {}
        self._numbers = itertools.count()
        self._shown: Any = None
        self._drawn = 0.0

    @property
    def tasks(self) -> Sequence[TaskID]:
        """The bars that stand there."""
        return list(self._bars)

    def start(self) -> None:
        """Opens a place in the output, unless there is one: bars that come later stand where the first ones stood."""
        from IPython.display import display  # only where it is loaded already

        if self._shown is None:
            self._shown = display(self._drawing(), raw=True, display_id=True)

    def add_task(self, title: str, *, total: int, completed: int, metrics: str) -> TaskID:
        """Draws one more bar."""
        task = TaskID(next(self._numbers))
        self._bars[task] = _Bar(title, total, completed, metrics)
        self.refresh()
        return task

    def update(self, task: TaskID, *, completed: int, metrics: str) -> None:
        """Moves a bar."""
        bar = self._bars[task]
        bar.completed, bar.metrics = completed, metrics
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_DRAWINGS or completed >= bar.total:
            self.refresh()

    def refresh(self) -> None:
        """Draws at once."""
        self._drawn = time.monotonic()
        self._shown.update(self._drawing(), raw=True)

    def remove_task(self, task: TaskID) -> None:
        """Takes a bar away."""
        del self._bars[task]
        self.refresh()

    def stop(self) -> None:
        """Ends the drawing; what stands there stays, and without bars that is nothing."""

    def _drawing(self) -> dict[str, str]:
        """The bars for a page, and for a front end that shows text alone."""
        bars = list(self._bars.values())
        return {
            "text/html": "".join(map(_bar, bars)),
            "text/plain": "\n".join(f"{bar.title}  {_told(bar)}" for bar in bars),
        }


def _told(bar: _Bar) -> str:
    return f"{bar.completed}/{bar.total}  {bar.metrics}"


def _bar(bar: _Bar) -> str:
    return (
        f'<div style="white-space: pre">{html.escape(bar.title)}  '
        f'<progress value="{bar.completed}" max="{bar.total}"></progress>  {html.escape(_told(bar))}</div>'
    )
