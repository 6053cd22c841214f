"""A study that comes into being file by file, as a search writes it, for readers that look in between."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any


class LiveStudy:
    """Lays the files of a finished study into another directory, a record at a time.

    Args:
      source: a finished study's directory.
      directory: where it grows; made with the first record.

    Attributes:
      records: the records that are still to come.
    """

    def __init__(self, source: Path, directory: Path):
        self.source, self.directory = source, directory
        lines = (source / "trials.jsonl").read_text(encoding="utf-8").splitlines()
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def write(self, data: bytes) -> None:
        """Appends to the journal."""
        self.directory.mkdir(exist_ok=True)
        with (self.directory / "trials.jsonl").open("ab") as journal:
            journal.write(data)

    def advance(self, event: str, trial: int | None = None) -> None:
        """Writes the records up to the next one of an event, as of now."""
        while self.records:
            record = {**self.records.pop(0), "time": time.time()}
            self.write(json.dumps(record).encode() + b"\n")
            if record["event"] == event and (trial is None or record.get("trial") == trial):
                return
        raise AssertionError(f"no {event} is to come")

    def train(self, trial: int, steps: int) -> None:
        """Writes a trial's metrics up to a step."""
        folder = self.directory / "trials" / f"{trial:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = (self.source / "trials" / f"{trial:03d}" / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= steps))
        # File systems may be a tick behind the clock that the journal's times come from.
        os.utime(folder / "metrics.jsonl", (time.time(), time.time()))

    def end(self) -> None:
        """Writes the rest of the journal, then the summary."""
        while self.records:
            self.advance(self.records[0]["event"])
        shutil.copy(self.source / "summary.json", self.directory / "summary.json")
