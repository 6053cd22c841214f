"""A journal that is being written, with what it tells so far: for searches and for experiments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.search.header import check_header, check_records, recorded_data
from jaxtune.search.journal import Journal
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import Interrupted, TrialRunner
from jaxtune.search.space import Space
from jaxtune.search.trial import History, Trial, TrialState, outcome_fields, replay, test_fields
from jaxtune.training.data_history import Fingerprints
from jaxtune.training.hooks import Event, ShouldStop, never


class Ledger:
    """The journal in a directory, locked for this process while open, and the history that it tells.

    A record is on the disk before it counts, and is taken in the way a restart would take it in.

    Args:
      run_dir: the directory.
      on_event: is told every record.
      should_stop: whether to end between two trials; once it says so it is not asked again.

    Attributes:
      history: the trials, as the journal tells them; empty until :meth:`open`.

    Raises:
      UserError: another process holds the directory, or a line of the journal before the last one is no record.
    """

    def __init__(self, run_dir: Path, *, on_event: Event | None = None, should_stop: ShouldStop = never):
        self.run_dir = run_dir
        self.history = History()
        self._on_event, self._should_stop, self._stopping = on_event, should_stop, False
        self._journal = Journal(run_dir)

    @property
    def path(self) -> Path:
        """The journal's file."""
        return self._journal.path

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        return self._journal.records

    def open(
        self,
        header: Mapping[str, Any],
        what: str,
        *,
        section: str,
        space: Space | None = None,
        first: Mapping[str, Any] | None = None,
        check: Callable[[History], None] = lambda history: None,
        data: Fingerprints,
        accept_changed_data: bool,
    ) -> None:
        """Checks that the journal is of this study and these data, or starts it, and reads it back.

        Args:
          header: what the first record has to say.
          what: the study, for messages.
          section: what the names of the header's settings start with in messages.
          space: that all trials lie in, but the reference; None where it is not one.
          first: what the first record tells beside that, where this process writes it.
          check: refuses a history that does not fit.
          data: fingerprints of the splits; {} where none are known.
          accept_changed_data: go on where the splits are not what they were.

        Raises:
          UserError: the journal is another study's or damaged, or the data have changed.
        """
        begun = bool(self.records)
        if begun:
            check_header(self.records, header, self.path, section)
            if space is not None:
                check_records(self.records, space, self.path)
        self.history = replay(self.records[1:], self.run_dir, self.path)
        check(self.history)
        known = recorded_data(self.records, self.path)
        now = known.follow(data, what, accept=accept_changed_data, begun=begun)
        if not begun:
            self._record("study", **header, **(first or {}), **({"fingerprints": data} if data else {}))
        elif now != known:
            self._record("data", fingerprints=data)

    def append(self, event: str, **fields: Any) -> None:
        """Writes a record about a trial (``trial``), and takes it in."""
        record = self._journal.append(event, **fields)
        self.history.apply(record, self.run_dir)
        self.emit(event, fields["trial"], record)

    def emit(self, event: str, trial: int | None, details: Mapping[str, Any]) -> None:
        """Tells whoever listens."""
        if self._on_event is not None:
            self._on_event(event, trial, details)

    def start(self, trial: Trial, step: int, phase: str) -> None:
        """Announces that a trial is about to train to a step."""
        trial.directory.mkdir(parents=True, exist_ok=True)
        self.emit("started", trial.id, {"step": step, "phase": phase, "configuration": trial.configuration})

    def scored(self, trial: Trial, step: int, outcome: Outcome, runner: TrialRunner) -> dict[str, Any]:
        """What every record of an outcome tells."""
        return {
            "trial": trial.id,
            "configuration": trial.configuration,
            "step": step,
            "total_steps": runner.total_steps(trial),
            **outcome_fields(outcome),
            **self.history.compiled(runner.program(trial)),
        }

    def test(self, state: TrialState | None, runner: TrialRunner) -> TestOutcome | None:
        """A finished trial, or the untuned model (None), on the test split: measured once; None without that split.

        Raises:
          Interrupted: it was told to stop.
        """
        known = self.history.untuned if state is None else state.test
        if known is not None:
            return known
        self.check_stop()
        trial = None if state is None else state.trial
        outcome = runner.test(trial)
        if outcome is not None:
            number, configuration = (None, None) if trial is None else (trial.id, trial.configuration)
            self.append("tested", trial=number, configuration=configuration, **test_fields(outcome))
        return outcome

    @property
    def stopping(self) -> bool:
        """Whether it was told to end."""
        self._stopping = self._stopping or self._should_stop()
        return self._stopping

    def check_stop(self) -> None:
        """Raises :class:`~jaxtune.search.runner.Interrupted` if it was told to end."""
        if self.stopping:
            raise Interrupted

    def _record(self, event: str, **fields: Any) -> None:
        self.emit(event, None, self._journal.append(event, **fields))

    def close(self) -> None:
        """Closes the file and gives up the lock."""
        self._journal.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
