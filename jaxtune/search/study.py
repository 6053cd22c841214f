"""A study: trials scored early, the best ones finished, one journal that a restart continues from.

Which scores a proposal knows follows from the journal: the proposal of trial ``n`` is computed as soon as trial
``n - 1`` is proposed, knows what was scored before that, and counts every other trial as pending. So it is there when
the next place is free, a study that was killed proposes the same trials when it goes on, and with several trials at a
time nothing waits for the slowest of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtune.config.metrics import Direction, Goal
from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.header import (
    check_header,
    check_records,
    check_room,
    first_record,
    lookup,
    recorded_data,
    settled,
    study_header,
)
from jaxtune.search.journal import Journal
from jaxtune.search.leader import leader
from jaxtune.search.methods import make_method
from jaxtune.search.milestones import Milestones, milestones
from jaxtune.search.outcome import Outcome
from jaxtune.search.promotion import next_to_finish, ranking
from jaxtune.search.proposals import Proposals, Proposed, Request
from jaxtune.search.results import StudySummary, trial_table
from jaxtune.search.runner import Interrupted, TrialRunner
from jaxtune.search.scores import Scores
from jaxtune.search.space import Point, Space
from jaxtune.search.status import read_recorded, score_of
from jaxtune.search.summary import build_summary, write_summary
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import History, Trial, TrialState, outcome_fields, replay, test_fields
from jaxtune.training.data_history import Fingerprints
from jaxtune.training.hooks import Event, ShouldStop, never

Phase = Literal["early", "final"]


class _Stopped(Exception):
    """The stop callable said so between two trials."""


class Study:
    """Finds the configuration that is worth finishing (arXiv:2407.13906).

    Args:
      run_dir: where the journal, the trials and the summary lie; an earlier study there is continued.
      search: space, number of trials, fraction, promotions, seed.
      runner: trains and scores trials.
      direction: whether the objective is minimised or maximised.
      reference: dotted overrides of ``base`` that make trial 0; ``base`` itself without any.
      start: configurations of the trials after the reference, instead of a design: of an earlier study.
      base: the resolved configuration, nested, that trials override; the journal remembers it.
      reference_config: ``base`` with ``reference`` applied, nested, where the reference's searched keys are looked up
        (a missing one puts it outside the space). If unset, ``reference`` itself and then ``base``.
      known_keys: every dotted key of the configuration; None skips the check of the space's keys.
      on_event: called after each journal record as ``(event, trial, record)``, and with ``started`` before a trial
        runs (``step``, ``phase``) and ``summary`` at the end.
      should_stop: asked between trials; once true, :meth:`run` returns and the study can be continued.
      keep: called with the winner before the runner closes; what it returns is the summary's ``adapter``.
      data: fingerprints of the splits that the runner trains and scores on; None where it knows none.
      accept_changed_data: go on where the training or the validation split is not what it was; otherwise refused.

    Attributes:
      goal: which way scores are better.
      space: the searched space.
      reference_in_space: whether the surrogate is told of trial 0: it cannot learn from a point outside its space.

    Raises:
      UserError: the space is empty, names unknown keys, or holds fewer configurations than there are trials.
    """

    def __init__(
        self,
        run_dir: str | Path,
        search: SearchConfig,
        runner: TrialRunner,
        *,
        direction: Direction = "min",
        reference: Mapping[str, Any] | None = None,
        start: Sequence[Mapping[str, Any]] = (),
        base: Mapping[str, Any] | None = None,
        reference_config: Mapping[str, Any] | None = None,
        known_keys: Iterable[str] | None = None,
        on_event: Event | None = None,
        should_stop: ShouldStop = never,
        keep: Callable[[Trial], Mapping[str, Any] | None] | None = None,
        data: Fingerprints | None = None,
        accept_changed_data: bool = False,
    ):
        self.run_dir = Path(run_dir)
        self.search = search = settled(search, first_record(self.run_dir))
        self.runner = runner
        self.goal = Goal(direction)
        self.reference = dict(reference or {})
        self.start = [dict(one) for one in start]
        self.base = {} if base is None else dict(base)
        self.space = Space(search.space, known_keys, search.fixed)
        # The first trials are proposed before anything is scored: they are all design.
        initial = max(search.initial, runner.capacity + 1)
        assert search.acquisition is not None, "a settled search names its acquisition"
        self._method = make_method(
            search.method, self.space, seed=search.seed, initial=initial, acquisition=search.acquisition
        )
        # Whatever proposes, scores are weighed by the Gaussian process.
        self._surrogate = Surrogate(self.space, seed=search.seed, initial=initial)
        self._reference_point = self._locate_reference(reference_config)
        self._scores = Scores(self.space, self._reference_point, self.goal.sign)
        self.reference_in_space = self._reference_point is not None
        self._data, self._accept_changed_data = dict(data or {}), accept_changed_data
        self._on_event, self._keep = on_event, keep
        self._stop, self._stopping = should_stop, False
        self._targets: dict[int, int] = {}
        if not search.fixed:  # else it depends on what was tried before
            check_room(self.space, search.trials, {0: self._reference_point})

    def _locate_reference(self, config: Mapping[str, Any] | None) -> Point | None:
        def value(key: str) -> Any:
            if config is not None:
                return lookup(config, key)
            return self.reference[key] if key in self.reference else lookup(self.base, key)

        try:
            return self.space.point({key: value(key) for key in self.space.keys})
        except KeyError:
            return None

    def run(self) -> StudySummary | None:
        """Runs the study to its end, or continues it.

        Returns:
          The summary, as written to ``summary.json``; None where the study was stopped before its end.

        Raises:
          UserError: another process holds the study, the journal is damaged or belongs to another study, the data have
            changed, the fraction is less than a step, or every trial diverged.
        """
        with Journal(self.run_dir) as self._journal:
            self._history = self._open()
            try:
                self._score_trials()
                self._finish_trials()
                best = self._best()
                self._test(best)
                kept = self._keep(best.trial) if self._keep is not None else None
            except (_Stopped, Interrupted):
                return None
            finally:
                self.runner.close()
            seen = self._scores.at(self._history.trials)
            summary = build_summary(
                self._history,
                best,
                objective=self.search.objective,
                direction=self.goal.direction,
                fraction=self.search.fraction,
                top_k=self.search.promote,
                posterior=self._surrogate.fit([observation for _, observation in seen]),
                reference_in_space=self.reference_in_space,
            )
            if kept is not None:
                summary["adapter"] = dict(kept)
            write_summary(self.run_dir, summary)
            self._emit("summary", best.trial.id, summary)
            return StudySummary(summary)

    def _repr_html_(self) -> str:
        """The trials so far, as the journal has them."""
        try:
            recorded = read_recorded(self.run_dir)
        except UserError:
            return trial_table([], f"{self.run_dir}: no trial yet")
        trials = [
            {
                "trial": number,
                "status": state.status,
                "early_score": score_of(state.early),
                "final_score": score_of(state.final),
                "configuration": recorded.configuration(state),
            }
            for number, state in sorted(recorded.history.trials.items())
        ]
        return trial_table(trials, f"{self.run_dir}: {len(trials)} of {self.search.trials} trials")

    # The journal

    def _open(self) -> History:
        """Checks that the journal is this study's, or starts it, and reads it back."""
        header = study_header(
            self.search,
            # Of one process: a study may go on over more workers, or fewer.
            population=self.runner.capacity // self.search.workers,
            direction=self.goal.direction,
            reference=self.reference,
            start=self.start,
            base=self.base,
        )
        records, path = self._journal.records, self._journal.path
        if records:
            check_header(records, header, path)
            check_records(records, self.space, path)
        history = replay(records[1:], self.run_dir, path)
        points = {number: self._scores.point(state) for number, state in history.trials.items()}
        check_room(self.space, self.search.trials, {0: self._reference_point} | points)
        known, what = recorded_data(records, path), f"the study in {self.run_dir}"
        data = known.follow(self._data, what, accept=self._accept_changed_data, begun=bool(records))
        if not records:
            self._record("study", **header, **({"fingerprints": self._data} if self._data else {}))
        elif data != known:
            self._record("data", fingerprints=self._data)
        return history

    def _record(self, event: str, **fields: Any) -> None:
        record = self._journal.append(event, **fields)
        self._emit(event, fields.get("trial"), record)

    def _append(self, event: str, **fields: Any) -> None:
        """Writes a record about a trial and takes it in, the way a restart would."""
        record = self._journal.append(event, **fields)
        self._history.apply(record, self.run_dir)
        self._emit(event, fields["trial"], record)

    def _emit(self, event: str, trial: int | None, details: Mapping[str, Any]) -> None:
        if self._on_event is not None:
            self._on_event(event, trial, details)

    def _asked_to_stop(self) -> bool:
        self._stopping = self._stopping or self._stop()
        return self._stopping

    def _check_stop(self) -> None:
        if self._asked_to_stop():
            raise _Stopped

    # Early scores

    def _score_trials(self) -> None:
        """Proposes and scores every trial that the journal does not have yet."""
        self._settle()
        trials = self._history.trials
        waiting = [state for state in trials.values() if not (state.ended or state.waits)]
        with Proposals(self._method, self.reference, self.start) as proposals:

            def take() -> TrialState:
                state = waiting.pop(0) if waiting else self._propose(proposals.take(self._request(len(trials))))
                if len(trials) < self.search.trials:
                    proposals.prepare(self._request(len(trials)))
                return state

            self._train("early", lambda _: take if waiting or len(trials) < self.search.trials else None)
        for rung in range(len(self.search.ladder)):
            self._climb(rung)
        if not any(state.ranked for state in trials.values()):
            raise UserError(self._all_diverged())

    def _climb(self, rung: int) -> None:
        """Takes the better half of the trials that wait at a rung of the ladder to the next one, or to the fraction.

        That is successive halving (Jamieson & Talwalkar 2016) before the trials are scored. The reference goes on
        beside the half. In a study that was extended, trials that went on before take their places in the half; what
        was decided of them stays.
        """
        trials = self._history.trials

        def step(trial: Trial) -> int:
            return self._milestones(trial).rungs[rung]

        order = list(ranking(self._scores.at(trials, step, self._history.lost), self._surrogate))
        half = math.ceil(len(order) / 2)
        here = {
            number: step(state.trial)
            for number, state in trials.items()
            if not state.ended and max(state.rungs, default=0) == step(state.trial)
        }
        for number in order[half:]:
            if number in here:
                configuration = trials[number].trial.configuration
                self._append("stopped", trial=number, configuration=configuration, step=here[number])
        waiting = [trials[number] for number in (0, *order[:half]) if number in here]
        self._train("early", lambda _: functools.partial(waiting.pop, 0) if waiting else None)

    def _milestones(self, trial: Trial) -> Milestones:
        return milestones(self.search, self.runner.total_steps(trial))

    def _request(self, number: int) -> Request:
        """What the proposal of a trial may know (see the module's text)."""
        known = self._history.trials
        before = set(known[number - 1].known) if number else set()
        first = (lambda trial: self._milestones(trial).rungs[0]) if self.search.ladder else None
        told = [(index, seen) for index, seen in self._scores.told(known, first) if index in before]
        pending = [
            (index, point)
            for index in sorted(known)
            if index not in before and (point := self._scores.point(known[index])) is not None
        ]
        return Request(number, told, pending)

    def _propose(self, proposed: Proposed) -> TrialState:
        self._append("proposed", **proposed.fields())
        return self._history.trials[proposed.request.trial]

    # Training

    def _train(self, phase: Phase, following: Callable[[set[int]], Callable[[], TrialState] | None]) -> None:
        """Keeps every place of the runner full until there is nothing left to train in a phase.

        Args:
          phase: what the trials are trained to the end of.
          following: given the numbers of the trials under way, what makes the next one; None while there is none. It is
            asked for the trial itself only if the study is to go on.
        """
        running: set[int] = set()
        while True:
            while len(running) < self.runner.capacity and (make := following(running)) is not None:
                if self._asked_to_stop():
                    break
                state = make()
                self._start(state, phase)
                running.add(state.trial.id)
            if not running:
                break
            running -= {state.trial.id for state in self._wait(phase)}
        self._check_stop()

    def _start(self, state: TrialState, phase: Phase) -> None:
        """Gives a trial to the runner, to be trained to the end of a phase, or to the next rung before it."""
        trial = state.trial
        until = self._until(trial, phase)
        if phase == "early":
            until = next((step for step in self._stops_before(trial, until) if step not in state.rungs), until)
        trial.directory.mkdir(parents=True, exist_ok=True)
        self._emit("started", trial.id, {"step": until, "phase": phase, "configuration": trial.configuration})
        self._targets[trial.id] = until
        self.runner.start(trial, until)

    def _stops_before(self, trial: Trial, until: int) -> Sequence[int]:
        """Steps before the fraction at which a trial is looked at."""
        if self.search.ladder:
            return self._milestones(trial).rungs
        # The reference is finished whatever comes.
        return self._method.rungs(until) if trial.id else ()

    def _until(self, trial: Trial, phase: Phase) -> int:
        steps = self._milestones(trial)
        return steps.total if phase == "final" else steps.early

    def _wait(self, phase: Phase) -> list[TrialState]:
        """Waits for scores, and writes them down; returns the trials that are through with the phase."""
        ended = []
        for trial, outcome in self.runner.wait():
            state, step = self._history.trials[trial.id], self._targets.pop(trial.id)
            until, total = self._until(trial, phase), self.runner.total_steps(trial)
            common = self._scored(state, step, outcome)
            if step < until and not outcome.failed:
                waits = bool(self.search.ladder)
                self._append("reported", **common, waits=waits)
                if waits:
                    ended.append(state)
                elif self._stops(trial):
                    self._append("stopped", trial=trial.id, configuration=trial.configuration, step=step)
                    ended.append(state)
                else:
                    self._start(state, phase)
                continue
            event = "failed" if outcome.failed else "scored" if phase == "early" else "finished"
            self._append(event, **common, phase=phase)
            if phase == "early" and until == total and not outcome.failed:
                self._append("finished", **self._scored(state, step, outcome), phase="final")
            ended.append(state)
        return ended

    def _stops(self, trial: Trial) -> bool:
        """Whether the method ends a trial at the last rung that it has reached, by the reports up to that one."""
        until = self._until(trial, "early")

        def rungs(other: Trial) -> Sequence[int]:
            return self._method.rungs(self._until(other, "early"))

        return self._method.stops(trial.id, until, self._scores.reports(self._history, trial, rungs))

    def _settle(self) -> None:
        """Makes good what a kill left out between a record and the one that follows from it alone."""
        for number, state in self._history.trials.items():
            trial, early = state.trial, state.early
            if state.rungs and not (state.ended or state.waits) and self._stops(trial):
                self._append("stopped", trial=number, configuration=trial.configuration, step=max(state.rungs))
            elif early is not None and state.ranked and state.final is None:
                steps = self._milestones(trial)
                if steps.early == steps.total:
                    self._append("finished", **self._scored(state, steps.total, early), phase="final")

    def _scored(self, state: TrialState, step: int, outcome: Outcome) -> dict[str, Any]:
        """What every record of an outcome tells."""
        return {
            "trial": state.trial.id,
            "configuration": state.trial.configuration,
            "step": step,
            "total_steps": self.runner.total_steps(state.trial),
            **outcome_fields(outcome),
            **self._history.compiled(self.runner.program(state.trial)),
        }

    def _finish_trials(self) -> None:
        """Finishes the reference and the most promising trials; the next in line replaces one that diverges."""
        trials, promoted = self._history.trials, self._history.promoted
        estimates = ranking(self._scores.at(trials, lost=self._history.lost), self._surrogate)
        order = [*promoted, *(number for number in estimates if number not in promoted)]

        def promote(state: TrialState) -> TrialState:
            number = state.trial.id
            if number and not state.promoted:
                self._append(
                    "promoted",
                    trial=number,
                    configuration=state.trial.configuration,
                    rank=order.index(number) + 1,
                    score=None if state.early is None else state.early.score,
                    estimate=self.goal.signed(estimates[number]),
                )
            return state

        def following(running: set[int]) -> Callable[[], TrialState] | None:
            state = next_to_finish(trials, order, running, self.search.promote)
            return None if state is None else functools.partial(promote, state)

        self._train("final", following)

    # The end

    def _best(self) -> TrialState:
        best = leader(self._history, self.goal, ended=True)
        if best is None:
            raise UserError(self._all_diverged())
        return best

    def _all_diverged(self) -> str:
        rates = [key for key in self.space.keys if key.endswith("learning_rate")]
        advice = f"lower the upper bound of search.space.{rates[0]}" if rates else "lower optimizer.learning_rate"
        return (
            f"all {self.search.trials} trials diverged (loss or score became NaN or infinite), the reference included; "
            f"{advice}, or set optimizer.clip_norm; {self._journal.path} keeps the trials"
        )

    def _test(self, best: TrialState) -> None:
        """Measures the base model, the reference and the winner on the test split, each once."""
        baseline = self._history.trials[0]
        subjects: list[TrialState | None] = [None]
        if baseline.finished:
            subjects.append(baseline)
        if best is not baseline:
            subjects.append(best)
        for state in subjects:
            done = self._history.untuned if state is None else state.test
            if done is not None:
                continue
            self._check_stop()
            outcome = self.runner.test(None if state is None else state.trial)
            if outcome is None:
                return
            self._append(
                "tested",
                trial=None if state is None else state.trial.id,
                configuration=None if state is None else state.trial.configuration,
                **test_fields(outcome),
            )
