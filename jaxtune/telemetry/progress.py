"""What a person sees while a run trains: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from jaxtune.config.metrics import METRICS, main_metrics
from jaxtune.parallel.distributed import is_writer
from jaxtune.telemetry.notebook import NotebookBars, in_notebook


def short(metrics: Mapping[str, float]) -> str:
    """The metrics worth a line, with few digits."""
    measured = {name: METRICS[name] for name in main_metrics()}
    shown = {
        "loss": "loss {:.4f}",
        **{metric.logged or name: f"{metric.label} {metric.format}" for name, metric in measured.items()},
        "learning_rate": "lr {:.2e}",
        "grad_norm": "norm {:.2f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "mfu {:.1%}",
    }
    return "  ".join(form.format(metrics[name]) for name, form in shown.items() if name in metrics)


class ProgressBoard:
    """The bars of the runs that train at the same time, one below the other; gone when none trains.

    Args:
      console: where to draw; if None the notebook, or a console on standard error, so that standard output stays for
        results.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(file=sys.stderr)
        self._notebook = console is None and in_notebook()
        self._bars: Progress | NotebookBars | None = None

    @property
    def watched(self) -> bool:
        """Whether bars can be drawn: somebody looks."""
        return self._notebook or self.console.is_terminal

    def add(self, title: str, step: int, total: int) -> TaskID:
        """Draws a bar."""
        if self._bars is None:
            self._bars = NotebookBars() if self._notebook else _terminal_bars(self.console)
        if not self._bars.tasks:
            self._bars.start()
        return self._bars.add_task(title, total=total, completed=step, metrics="")

    def update(self, task: TaskID, step: int, text: str) -> None:
        """Moves a bar."""
        if self._bars is not None:
            self._bars.update(task, completed=step, metrics=text)

    def refresh(self) -> None:
        """Draws at once, without waiting for the next tick."""
        if self._bars is not None:
            self._bars.refresh()

    def remove(self, task: TaskID) -> None:
        """Takes a bar away."""
        if self._bars is not None:
            self._bars.remove_task(task)
            if not self._bars.tasks:
                self._bars.stop()
                if not self._notebook:
                    self._bars = None


def _terminal_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def watched(title: str, board: ProgressBoard | None = None) -> ProgressDisplay | None:
    """A display where someone looks, at a terminal or a notebook; None elsewhere, and in all processes but the first.

    Args:
      title: the name in front of the bar.
      board: where the bar stands; one of its own if None.
    """
    board = board or ProgressBoard()
    return ProgressDisplay(board, title) if board.watched and is_writer() else None


class ProgressDisplay:
    """Follows one call of the training loop.

    Args:
      board: where its bar stands; one of its own on standard error if None.
      title: the name in front of the bar.
      quiet: show nothing.
      clock: seconds.
    """

    def __init__(
        self,
        board: ProgressBoard | None = None,
        title: str = "train",
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._board = board or ProgressBoard()
        self._title, self._quiet = title, quiet
        self._task: TaskID | None = None
        self._total = 0
        self._clock = clock
        self._start = (0, 0.0)

    def on_start(self, step: int, total: int) -> None:
        """The loop starts at ``step`` and ends at ``total``."""
        self._total = total
        self._start = (step, self._clock())
        if not self._quiet and self._board.watched:
            self._task = self._board.add(self._title, step, total)

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one step were logged."""
        if self._quiet:
            return
        if self._task is None:
            line = f"{self._title}  step {step}/{self._total}  {short(metrics)}{self._left(step)}"
            self._board.console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            self._board.update(self._task, step, short(metrics))

    def _left(self, step: int) -> str:
        """The time that the remaining steps will take at the pace so far."""
        first, begin = self._start
        if not first < step < self._total:
            return ""
        seconds = round((self._clock() - begin) / (step - first) * (self._total - step))
        return f"  {datetime.timedelta(seconds=seconds)} left"

    def on_end(self) -> None:
        """The loop is over."""
        if self._task is not None:
            self._board.remove(self._task)
            self._task = None
