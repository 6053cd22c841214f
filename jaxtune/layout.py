"""What lies where in the directories of runs, of studies and of their trials: each file and folder is named here.

The names are contracts: other programs read these files. Nothing is opened here, and nothing heavy imported, so that
whatever looks for a file can ask.
"""

from __future__ import annotations

import os
from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_FOLDER = "checkpoints"
JOURNAL_FILE = "trials.jsonl"
SUMMARY_FILE = "summary.json"
TRIALS_FOLDER = "trials"
WORKERS_FOLDER = "workers"


class TrialDirectory:
    """The files of one training, which may be a trial's; they need not be there.

    Args:
      path: the directory.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / CONFIG_FILE

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / METRICS_FILE

    @property
    def checkpoints_path(self) -> Path:
        """Orbax checkpoints."""
        return self.path / CHECKPOINTS_FOLDER

    def predictions_path(self, name: str) -> Path:
        """What the model answers on a split, as ``jaxtune compare`` keeps it."""
        return self.path / "predictions" / f"{name}.json"

    @property
    def study_path(self) -> Path | None:
        """The study among whose trials this lies, beginning as the directory was given; None where it lies in none."""
        place = self.path.absolute()
        study = place.parent.parent
        if place.parent != study / TRIALS_FOLDER or not (study / JOURNAL_FILE).exists():
            return None
        return self.path.parent.parent if len(self.path.parts) > 2 else study

    @property
    def number(self) -> int | None:
        """The trial's number, as the name says; None where it is no trial's name."""
        name = self.path.absolute().name
        return int(name) if name.isdecimal() else None


class RunFiles(TrialDirectory):
    """The files of a run's or a study's directory; they need not be there.

    Args:
      path: the directory.
    """

    @property
    def journal_path(self) -> Path:
        """The journal of a study."""
        return self.path / JOURNAL_FILE

    @property
    def summary_path(self) -> Path:
        """The end of a run, for programs."""
        return self.path / SUMMARY_FILE

    @property
    def adapter_path(self) -> Path:
        """The PEFT adapter of a finished run."""
        return self.path / "adapter"

    @property
    def model_path(self) -> Path:
        """The whole model of a finished run whose training no adapter holds."""
        return self.path / "model"

    @property
    def data_path(self) -> Path:
        """Fingerprints of the data of a single run; a study has them in its journal."""
        return self.path / "data.json"

    @property
    def tensorboard_path(self) -> Path:
        """Event files of TensorBoard."""
        return self.path / "tensorboard"

    @property
    def profile_path(self) -> Path:
        """The trace of ``jaxtune profile``."""
        return self.path / "profile"

    @property
    def report_path(self) -> Path:
        """The page of a study."""
        return self.path / "report.html"

    @property
    def run_lock_path(self) -> Path:
        """What the process that trains the run holds."""
        return self.path / "run.lock"

    @property
    def study_lock_path(self) -> Path:
        """What the process that writes a study's journal holds."""
        return self.path / "study.lock"

    @property
    def search_path(self) -> Path:
        """The search of an ablation, a study of its own."""
        return self.path / "search"

    @property
    def workers_path(self) -> Path:
        """What the workers of a study write beside its trials."""
        return self.path / WORKERS_FOLDER

    def worker_log_path(self, index: int) -> Path:
        """What a worker and those that take its place print."""
        return self.workers_path / f"{index}.log"

    def trial_lock_path(self, trial: TrialDirectory) -> Path:
        """What the worker that trains a trial holds."""
        return self.workers_path / f"{trial.path.name}.lock"

    def probe_path(self, token: str) -> Path:
        """By what workers are known to see the same directory."""
        return self.workers_path / f"probe-{token}"

    def trial(self, number: int) -> TrialDirectory:
        """The directory of a trial."""
        return TrialDirectory(self.path / TRIALS_FOLDER / f"{number:03d}")

    @property
    def has_begun(self) -> bool:
        """Whether a run or a study was begun here, from its first step on.

        A folder of checkpoints proves nothing: projects with a ``config.yaml`` of their own have such folders too.
        """
        traces = (self.run_lock_path, self.metrics_path, self.study_lock_path, self.journal_path)
        return any(trace.exists() for trace in traces)
