"""The directory of a run: who may write into it, and what a finished run leaves."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import Config, dotted, dump_config, load_config
from jaxtune.config.paths import recorded
from jaxtune.config.roles import marked, within
from jaxtune.config.section import Amendable, Free, Relocatable
from jaxtune.errors import UserError
from jaxtune.files import acquire_lock, check_writable, write_atomically
from jaxtune.layout import WORKERS_FOLDER, RunFiles
from jaxtune.training.data_history import DataHistory, Fingerprints


def different_keys(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The dotted keys in which two configurations differ, but for where their runs lie.

    A date that one of them leaves open is the other's.
    """
    keys = {key for key in there.keys() | here.keys() if not within(key, marked(Relocatable))}
    if there.get("data.date") is None or here.get("data.date") is None:
        keys -= {"data.date"}
    return sorted(key for key in keys if there.get(key) != here.get(key))


class RunDirectory(RunFiles):
    """A directory that holds one run, or one study.

    Args:
      path: the directory; made by :meth:`claim`.
      study: whether it is a study's.
    """

    def __init__(self, path: str | Path, *, study: bool = False):
        super().__init__(path)
        self.study = study

    def date(self) -> str | None:
        """The day that chat templates show: as recorded, or that on which what is here was begun; None before that."""
        if not self.config_path.exists():
            return None
        recorded = load_config(self.config_path).data.date
        return recorded or datetime.date.fromtimestamp(self._begun()).isoformat()

    def _begun(self) -> float:
        """When what is here was begun, in seconds since 1970: by the journal, else by the configuration's file."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), self.journal_path.open("rb") as file:
            return float(json.loads(file.readline())["time"])
        return self.config_path.stat().st_mtime

    def read_data(self) -> DataHistory:
        """The fingerprints of the data that the run in here has seen.

        Raises:
          UserError: their file is damaged.
        """
        if not self.data_path.exists():
            return DataHistory()
        try:
            entries = json.loads(self.data_path.read_text(encoding="utf-8"))["fingerprints"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.data_path}: no fingerprints of data ({error!r}); restore or remove it") from error
        return DataHistory.read(entries, self.data_path)

    def follow_data(self, now: Fingerprints, *, accept: bool = False) -> DataHistory:
        """What :meth:`write_data` is to keep, where the run in here goes on with these data, or begins.

        Raises:
          UserError: they have changed; see :meth:`~jaxtune.training.data_history.DataHistory.follow`.
        """
        begun = self.checkpoints_path.exists()
        return self.read_data().follow(now, f"the run in {self.path}", accept=accept, begun=begun)

    def write_data(self, data: DataHistory) -> None:
        """Keeps the fingerprints."""
        if data != self.read_data():
            write_atomically(self.data_path, json.dumps({"fingerprints": data.entries}, indent=2) + "\n")

    def check_place(self) -> None:
        """Refuses a directory that is none for a run, whatever the run's configuration.

        Raises:
          UserError: a study stands where a run is to be or the other way round, or files of no run; or nothing can be
            written there.
        """
        check_writable(self.path, "run_dir")
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"run_dir: {self.path} is a file, not a directory")
        other = self.metrics_path if self.study else self.journal_path
        if other.exists():
            kind = "a single run" if self.study else "a study"
            raise UserError(
                f"run_dir: {self.path} holds {kind} ({other.name}); choose another directory with run_dir=…"
            )
        if not self.study and self.study_path is not None:
            raise UserError(
                f"run_dir: {self.path} is a trial of the study in {self.study_path}, which trains it; to train the "
                f"configuration by itself, choose another directory with run_dir=…"
            )
        if not self.config_path.exists():
            # Workers of a study write there before it begins.
            names = {item.name for item in self.path.iterdir() if not item.name.startswith(".")} - {WORKERS_FOLDER}
            if strangers := sorted(names):
                raise UserError(
                    f"run_dir: {self.path} holds files of something else ({', '.join(strangers[:5])}); choose another "
                    f"directory with run_dir=…"
                )

    def check(self, config: Config) -> None:
        """Refuses a directory that holds something else.

        Raises:
          UserError: as :meth:`check_place`, or another run's configuration stands there (the differing keys are named).
            A single run may have become longer.
        """
        self.check_place()
        if not self.config_path.exists():
            return
        there, here = dotted(load_config(self.config_path)), dotted(config)
        different = self._different(there, here)
        if different and not self.taken_further(config):
            shown = "\n".join(f"  {key}: there {there.get(key)!r}, now {here.get(key)!r}" for key in different[:8])
            more = f"\n  … and {len(different) - 8} more" if len(different) > 8 else ""
            raise UserError(
                f"run_dir: {self.path} holds another run; it differs in\n{shown}{more}\n"
                f"choose another directory with run_dir=…, or remove that one{self._extensible(different)}"
            )

    def taken_further(self, config: Config) -> bool:
        """Whether a configuration is that of the run in here with more ``train.steps``, and nothing else."""
        if self.study or not self.config_path.exists():
            return False
        before, now = load_config(self.config_path), config
        longer = (before.train.steps or 0) < (now.train.steps or 0)
        return longer and self._different(dotted(before), dotted(now)) == ["train.steps"]

    def _different(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
        """The keys in which another run differs from the one in here."""
        # Of a study the journal guards what decides the trials.
        return [key for key in different_keys(there, here) if not within(key, marked(Free))]

    def _extensible(self, different: list[str]) -> str:
        """How a study that differs only in what may change after its start goes on."""
        if not self.study or not all(within(key, marked(Amendable)) for key in different):
            return ""
        return (
            f"; to go on with it as it is: jaxtune search {self.config_path}; to change it: jaxtune study extend "
            f"{self.path} …"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other process may run what is in the directory.

        Raises:
          UserError: another process does.
        """
        descriptor = acquire_lock(self.run_lock_path, "run")
        try:
            yield
        finally:
            os.close(descriptor)

    def claim(self, config: Config) -> None:
        """Checks the directory and writes the configuration into it.

        Raises:
          UserError: as :meth:`check`.
        """
        self.check(config)
        if not self.config_path.exists():
            write_atomically(self.config_path, dump_config(recorded(config, self.path)))

    def take_further(self, config: Config) -> None:
        """Makes the run in here a longer one, which has not ended; its checkpoints and metrics stay as they are.

        Called where no other process can run it; does nothing unless :meth:`taken_further`.
        """
        if self.taken_further(config):
            # In this order: with the new length and the old summary, the run would count as finished.
            self.summary_path.unlink(missing_ok=True)
            write_atomically(self.config_path, dump_config(recorded(config, self.path)))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json`` atomically."""
        write_atomically(self.summary_path, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None; paths in it are those of the directory as it is named now.

        Raises:
          UserError: the file is damaged.
        """
        try:
            summary = json.loads(self.summary_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            summary = error
        if not isinstance(summary, dict) or not summary:
            raise UserError(
                f"{self.summary_path}: not the summary of a run; remove it, and the same command writes it again"
            )
        if "run_dir" in summary:
            summary["run_dir"] = str(self.path)
        for name, path in (("adapter", self.adapter_path), ("model", self.model_path)):
            if name in summary:
                summary[name]["path"] = str(path)
        return summary
