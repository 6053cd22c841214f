"""The trials of an experiment: kept in a study's journal, so that a process that was killed goes on where it stopped.

The journal is a search's own (:mod:`jaxtune.search.journal`), with the same events. A trial may be scored at several
steps: each score is a record of its own, and none is measured twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import Config
from jaxtune.config.metrics import METRICS
from jaxtune.errors import UserError
from jaxtune.search.header import deciding
from jaxtune.search.journal import difference, plain
from jaxtune.search.ledger import Ledger
from jaxtune.search.outcome import Outcome, TestOutcome
from jaxtune.search.runner import TrialRunner, run_all
from jaxtune.search.settings import reference_overrides, search_config
from jaxtune.search.trial import History, Trial, read_outcome
from jaxtune.telemetry.environment import machine
from jaxtune.training.data_history import Fingerprints
from jaxtune.training.hooks import NOBODY, Hooks

PACKAGES = ("jaxtune", "jax", "jaxlib", "flax", "optax", "scikit-optimize", "numpy", "scipy")
"""Packages whose versions stand beside the results."""

Target = tuple[Trial, int]
"""A trial and the step that it is to be scored at."""


class ExperimentTrials:
    """The trials of one experiment in its run directory, which is locked while this is open.

    Args:
      config: resolved; its ``search`` section, if it has one, says what a score is.
      experiment: name of the experiment: ``early-score``.
      runner: trains and scores trials.
      settings: what else decides which trials there are and where they are scored; a run directory in which these, or
        the configuration, were others is refused.
      planned: how many trials there will be; None where that is not known yet.
      objective: what a score is, where there is no search.
      hooks: who is told, and who may stop it between trials.
      data: fingerprints of the splits that are trained and scored on.

    Raises:
      UserError: another process holds the directory, its journal is damaged or another experiment's, or the data have
        changed.
    """

    def __init__(
        self,
        config: Config,
        experiment: str,
        runner: TrialRunner,
        *,
        settings: Mapping[str, Any],
        planned: int | None = None,
        objective: str | None = None,
        hooks: Hooks = NOBODY,
        data: Fingerprints | None = None,
    ):
        self.runner = runner
        self.run_dir = Path(config.directory)
        self._hooks = hooks
        self._outcomes: dict[tuple[int, int], Outcome] = {}
        self._added = 0
        self._ledger = Ledger(self.run_dir, on_event=self._hooks.on_event, should_stop=self._hooks.should_stop)
        try:
            self._ledger.open(
                _header(config, experiment, settings, planned, objective),
                f"the experiment in {self.run_dir}",
                section="",
                first={"population": runner.capacity, "machine": machine(PACKAGES)},
                data=dict(data or {}),
                accept_changed_data=self._hooks.accept_changed_data,
            )
        except BaseException:
            self._ledger.close()
            raise
        for record in self._ledger.records[1:]:
            self._remember(record)

    def __enter__(self) -> ExperimentTrials:
        return self

    def __exit__(self, *_: object) -> None:
        self._ledger.close()

    def add(self, configuration: Mapping[str, Any], **details: Any) -> Trial:
        """The next trial: a new one, or the one that an earlier process put in this place.

        Args:
          configuration: dotted overrides of the experiment's configuration.
          details: what the trial stands for, kept in its record.

        Raises:
          UserError: the journal has another configuration in this place.
        """
        number = self._added
        self._added += 1
        known = self.history.trials.get(number)
        if known is None:
            record = {"configuration": dict(configuration), "source": "design", "told": [], "pending": []}
            self._append("proposed", trial=number, **record, **details)
            return self.history.trials[number].trial
        if found := difference(known.trial.configuration, dict(configuration)):
            raise UserError(
                f"{self._ledger.path}: trial {number} is another one: {found}; choose another run_dir, or set it back"
            )
        return known.trial

    def score(self, targets: Iterable[Target], runner: TrialRunner | None = None) -> None:
        """Trains trials to steps and scores them there; what is scored already, or has diverged, is left alone.

        Args:
          targets: a trial may be named once in a call, and from call to call only with rising steps.
          runner: instead of the experiment's own.

        Raises:
          Interrupted: it was told to stop; the same calls go on from there.
        """
        runner = self.runner if runner is None else runner
        due = {trial.id: (trial, step) for trial, step in targets if self.outcome(trial, step) is None}
        try:
            for trial, outcome in run_all(runner, self._starting(due.values(), runner)):
                total, step = runner.total_steps(trial), due[trial.id][1]
                last = step == total
                event = "failed" if outcome.failed else "finished" if last else "scored"
                phase = "final" if last else "early"
                self._append(event, **self._ledger.scored(trial, step, outcome, runner), phase=phase)
        finally:
            runner.close()

    def outcome(self, trial: Trial, step: int) -> Outcome | None:
        """What a trial came to at a step: its score there, or the divergence before it; None if it is not known yet."""
        known = self._outcomes.get((trial.id, step))
        if known is not None:
            return known
        earlier = (outcome for (number, at), outcome in self._outcomes.items() if number == trial.id and at <= step)
        return next((outcome for outcome in earlier if outcome.failed), None)

    def test(self, trial: Trial | None, runner: TrialRunner | None = None) -> TestOutcome | None:
        """A finished trial, or the untuned model (None), on the test split: measured once; None without that split.

        Raises:
          Interrupted: it was told to stop.
        """
        state = None if trial is None else self.history.trials[trial.id]
        return self._ledger.test(state, self.runner if runner is None else runner)

    @property
    def history(self) -> History:
        """The trials so far."""
        return self._ledger.history

    @property
    def machine(self) -> dict[str, Any]:
        """Hardware and versions that the experiment was started with."""
        return self._ledger.records[0]["machine"]

    @property
    def budget(self) -> dict[str, Any]:
        """What the experiment took, over all processes that worked on it.

        ``steps_run`` (optimizer steps of all trials), ``seconds`` (of scoring and testing), ``compilations``
        (programs of a train step).
        """
        steps: dict[int, int] = {}
        for (number, _), outcome in self._outcomes.items():
            steps[number] = max(steps.get(number, 0), outcome.steps_run)
        states = self.history.trials.values()
        measured = [*self._outcomes.values(), self.history.untuned, *(state.test for state in states)]
        return {
            "steps_run": sum(steps.values()),
            "seconds": sum(outcome.seconds for outcome in measured if outcome is not None),
            "compilations": sum(state.compilations for state in states),
        }

    def _remember(self, record: Mapping[str, Any]) -> None:
        if record["event"] in ("scored", "finished", "failed"):
            self._outcomes[record["trial"], record["step"]] = read_outcome(record)

    def _append(self, event: str, **fields: Any) -> None:
        """Writes a record and takes it in, the way a restart would."""
        self._ledger.append(event, **fields)
        self._remember(self._ledger.records[-1])

    def _starting(self, targets: Iterable[Target], runner: TrialRunner) -> Iterator[Target]:
        """The targets, each announced when it is about to start."""
        for trial, step in targets:
            self._ledger.check_stop()
            self._ledger.start(trial, step, "final" if step == runner.total_steps(trial) else "early")
            yield trial, step


def _header(
    config: Config, experiment: str, settings: Mapping[str, Any], planned: int | None, objective: str | None
) -> dict[str, Any]:
    """The journal's first record: what a search's has, so that whatever reads a search's journal reads this one."""
    search = config.search
    space = {} if search is None else search.space
    name = search_config(config).objective if objective is None else objective
    return plain(
        {
            "experiment": experiment,
            "settings": dict(settings),
            "space": {key: value.model_dump(exclude_none=True) for key, value in space.items()},
            "objective": {"name": name, "direction": METRICS[name].direction},
            "fraction": 1.0,
            "trials": planned,
            "seed": None if search is None else search.seed,
            "reference": {} if search is None else reference_overrides(config),
            "config": deciding(config),
        }
    )
