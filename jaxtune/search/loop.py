"""Training the trials of a study: every place of the runner kept full, every score written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtune.search.ledger import Ledger
from jaxtune.search.lockstep import Lockstep
from jaxtune.search.methods import Method
from jaxtune.search.milestones import Milestones
from jaxtune.search.outcome import Outcome
from jaxtune.search.runner import TrialRunner
from jaxtune.search.scores import Scores
from jaxtune.search.settings import Settings
from jaxtune.search.trial import Trial, TrialState

Phase = Literal["early", "final"]
Next = Callable[[set[int]], Callable[[], TrialState] | None]
"""Given the numbers of the trials under way, what makes the next one; None while there is none."""


class TrialLoop:
    """Trains trials from one milestone to the next.

    Args:
      settings: of the study.
      runner: trains and scores trials.
      method: may stop trials on the way to the fraction.
      scores: what the method is told of them.
      ledger: opened.
    """

    def __init__(self, settings: Settings, runner: TrialRunner, method: Method, scores: Scores, ledger: Ledger):
        self._settings, self._runner, self._method, self._scores = settings, runner, method, scores
        self._ledger, self._history = ledger, ledger.history
        self._targets: dict[int, int] = {}
        self.order = Lockstep(runner, ledger.history, self._targets)
        self._wait_for = runner.wait

    def milestones(self, trial: Trial) -> Milestones:
        """The steps at which a trial is looked at."""
        return self._settings.milestones(self._runner.total_steps(trial))

    def train(self, phase: Phase, following: Next, *, proposing: bool = False) -> None:
        """Keeps every place of the runner full until there is nothing left to train in a phase.

        Args:
          phase: what the trials are trained to the end of, or to the next rung before it.
          following: is asked for the next trial itself only if the study is to go on.
          proposing: whether what follows depends on the order of the scores.

        Raises:
          Interrupted: the study, or its runner, was told to stop.
        """
        self._wait_for = self.order.wait if proposing else self._runner.wait
        running: set[int] = set()
        while True:
            while len(running) < self._runner.capacity and (make := following(running)) is not None:
                if self._ledger.stopping:
                    break
                state = make()
                self._start(state, phase)
                running.add(state.trial.id)
            if not running:
                break
            running -= {state.trial.id for state in self._wait(phase)}
        self._ledger.check_stop()

    def settle(self) -> None:
        """Makes good what a kill left out between a record and the one that follows from it alone."""
        for state in self._history.trials.values():
            trial, early = state.trial, state.early
            if state.rungs and not (state.ended or state.waits) and self._stops(trial):
                self.stop(state, max(state.rungs))
            elif early is not None and state.ranked and state.final is None:
                steps = self.milestones(trial)
                if steps.early == steps.total:
                    self._record("finished", trial, steps.total, early, phase="final")

    def stop(self, state: TrialState, step: int) -> None:
        """Ends a trial before the fraction, for good."""
        self._ledger.append("stopped", trial=state.trial.id, configuration=state.trial.configuration, step=step)

    def _start(self, state: TrialState, phase: Phase) -> None:
        """Gives a trial to the runner, to be trained to the end of a phase, or to the next rung before it."""
        trial = state.trial
        until = self._until(trial, phase)
        stops = self._stops_before(trial, until) if phase == "early" else self.milestones(trial).finish
        until = next((step for step in stops if state.at(step) is None), until)
        self._ledger.start(trial, until, phase)
        self._targets[trial.id] = until
        self.order.start(trial.id)
        self._runner.start(trial, until)

    def _stops_before(self, trial: Trial, until: int) -> Sequence[int]:
        """Steps before the fraction at which a trial is looked at."""
        if self._settings.search.ladder:
            return self.milestones(trial).rungs
        # The reference is finished whatever comes.
        return self._method.rungs(until) if trial.id else ()

    def _until(self, trial: Trial, phase: Phase) -> int:
        steps = self.milestones(trial)
        return steps.total if phase == "final" else steps.early

    def _wait(self, phase: Phase) -> list[TrialState]:
        """Waits for scores, and writes them down; returns the trials that are through with the phase."""
        ended = []
        for trial, outcome in self._wait_for():
            state, step = self._history.trials[trial.id], self._targets.pop(trial.id)
            until, total = self._until(trial, phase), self._runner.total_steps(trial)
            if step < until and not outcome.failed and phase == "final":
                self._record("reported", trial, step, outcome, phase=phase)
                ended.append(state)
                continue
            if step < until and not outcome.failed:
                waits = bool(self._settings.search.ladder)
                self._record("reported", trial, step, outcome, waits=waits)
                if waits:
                    ended.append(state)
                elif self._stops(trial):
                    self.stop(state, step)
                    ended.append(state)
                else:
                    self._start(state, phase)
                continue
            event = "failed" if outcome.failed else "scored" if phase == "early" else "finished"
            self._record(event, trial, step, outcome, phase=phase)
            if phase == "early" and until == total and not outcome.failed:
                self._record("finished", trial, step, outcome, phase="final")
            ended.append(state)
        return ended

    def _record(self, event: str, trial: Trial, step: int, outcome: Outcome, **details: str | bool) -> None:
        self._ledger.append(event, **self._ledger.scored(trial, step, outcome, self._runner), **details)

    def _stops(self, trial: Trial) -> bool:
        """Whether the method ends a trial at the last rung that it has reached, by the reports up to that one."""
        until = self._until(trial, "early")

        def rungs(other: Trial) -> Sequence[int]:
            return self._method.rungs(self._until(other, "early"))

        return self._method.stops(trial.id, until, self._scores.reports(self._history, trial, rungs))
