"""Where metrics go: ``metrics.jsonl`` (the record of a run), TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtune.errors import UserError
from jaxtune.files import naming, write_atomically

_FLUSH_SECONDS = 10.0
"""How long TensorBoard may wait for what was written."""


@runtime_checkable
class MetricWriter(Protocol):
    """Takes one mapping of numbers for each logged step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of a step."""
        ...

    def close(self) -> None:
        """Flushes and releases files."""
        ...


@runtime_checkable
class CutBack(Protocol):
    """A writer that can take back what it was told."""

    def cut_back(self, step: int) -> None:
        """Removes what was written after a step, as a run goes on from there."""
        ...


class JsonlWriter:
    """One JSON object per line, flushed at once; not-a-number is written as null, so that every reader can read it.

    Args:
      path: the file; made if missing.
      resume_at: a step; what an earlier process logged after it is cut off, so that each step stands there once.
    """

    def __init__(self, path: str | Path, resume_at: int = 0):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut_back(self.path, resume_at)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line."""
        record = {"step": step} | {
            name: value if not isinstance(value, float) or math.isfinite(value) else None
            for name, value in metrics.items()
        }
        with naming(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def cut_back(self, step: int) -> None:
        """Removes the lines after a step."""
        self._file.close()
        _cut_back(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        with naming(self.path):
            self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line torn by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _cut_back(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


class TensorBoardWriter:
    """Event files for TensorBoard.

    Args:
      directory: of the event files.
      resume_at: a step; TensorBoard leaves out what an earlier process logged after it.
    """

    def __init__(self, directory: str | Path, resume_at: int = 0):
        self._directory, self._opened = Path(directory), 0
        self._open(resume_at + 1 if resume_at else None)

    def _open(self, purge_step: int | None) -> None:
        # tensorboardX's SummaryWriter writes in a thread of its own: what fails there is told as a traceback, and by
        # nobody to the run. This is what it writes with.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._directory.mkdir(parents=True, exist_ok=True)
        self._opened += 1
        with naming(self._directory):
            self._events = EventsWriter(str(self._directory / "events"), f".{os.getpid()}.{self._opened}")
            if purge_step is not None:
                self._events.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
            self._flush()

    def _flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one scalar for each number."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        with naming(self._directory):
            for name, value in metrics.items():
                self._events.write_event(Event(step=step, wall_time=time.time(), summary=scalar(name, value)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._flush()

    def cut_back(self, step: int) -> None:
        """Tells TensorBoard, in a new event file, to leave out what stands after a step."""
        self.close()
        self._open(step + 1)

    def close(self) -> None:
        """Flushes the event file."""
        with naming(self._directory):
            self._events.close()


def check_wandb(project: str | None) -> None:
    """Looks for the package where Weights & Biases is asked for.

    Raises:
      UserError: it is not installed.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("telemetry.wandb: install the package with: pip install 'jaxtune[wandb]'")


class WandbWriter:
    """Weights & Biases.

    The run there is known by the run directory, so a run that goes on in it goes on there as well.

    Args:
      project: the project's name.
      name: the run's name.
      directory: the run directory, where the package keeps its own files too.
      config: what the run's page shows as its configuration.

    Raises:
      UserError: the package is not installed, or nobody is logged in.
    """

    def __init__(self, project: str, name: str, directory: str | Path, config: Mapping[str, Any]):
        check_wandb(project)
        import wandb  # pyright: ignore[reportMissingImports]

        place = hashlib.sha256(str(Path(directory).resolve()).encode()).hexdigest()[:12]
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                id=f"{name}-{place}",
                dir=str(directory),
                resume="allow",
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(f"telemetry.wandb: {' '.join(str(error).split())}") from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = list(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the metrics to every writer."""
        for writer in self._writers:
            writer.write(step, metrics)

    def cut_back(self, step: int) -> None:
        """Tells every writer that can."""
        for writer in self._writers:
            if isinstance(writer, CutBack):
                writer.cut_back(step)

    def close(self) -> None:
        """Closes every writer, whatever becomes of the others."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)
