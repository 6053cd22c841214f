"""A study: trials scored early, the best ones finished, one journal that a restart continues from.

Which scores a proposal knows follows from the journal: the proposal of trial ``n`` is computed as soon as trial
``n - 1`` is proposed, knows what was scored before that, and counts every other trial as pending. So it is there when
the next place is free, a study that was killed proposes the same trials when it goes on, and with several trials at a
time nothing waits for the slowest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.config.metrics import Direction
from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.allowance import allowance
from jaxtune.search.climb import Climb
from jaxtune.search.costs import Count
from jaxtune.search.enough import Budget, Enough
from jaxtune.search.header import check_room, first_record
from jaxtune.search.leader import leader
from jaxtune.search.ledger import Ledger
from jaxtune.search.loop import TrialLoop
from jaxtune.search.methods import make_method
from jaxtune.search.methods.several import Several
from jaxtune.search.proposals import Proposals, Proposed, Request
from jaxtune.search.repeats import repeat
from jaxtune.search.results import StudySummary, trial_table
from jaxtune.search.runner import Interrupted, TrialRunner
from jaxtune.search.scores import Scores
from jaxtune.search.settings import Settings
from jaxtune.search.space import Point
from jaxtune.search.status import read_recorded, score_of
from jaxtune.search.summary import build_summary, write_summary
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import History, Trial, TrialState
from jaxtune.training.data_history import Fingerprints
from jaxtune.training.hooks import Event, ShouldStop, never


class Study:
    """Finds the configuration that is worth finishing (arXiv:2407.13906).

    Args:
      run_dir: where the journal, the trials and the summary lie; an earlier study there is continued.
      search: space, number of trials, fraction, promotions, seed: the section, or what follows from a configuration.
      runner: trains and scores trials.
      start: configurations of the trials after the reference, instead of a design: of an earlier study.
      direction: whether the objective is minimised or maximised. This and the next four go with a section alone.
      reference: dotted overrides of ``base`` that make trial 0; ``base`` itself without any.
      base: the resolved configuration, nested, that trials override; the journal remembers it.
      reference_config: ``base`` with ``reference`` applied, nested, where the reference's searched keys are looked up
        (a missing one puts it outside the space). If unset, ``reference`` itself and then ``base``.
      known_keys: every dotted key of the configuration; None skips the check of the space's keys.
      on_event: called after each journal record as ``(event, trial, record)``, and with ``started`` before a trial
        runs (``step``, ``phase``) and ``summary`` at the end.
      should_stop: asked between trials; once true, :meth:`run` returns and the study can be continued.
      keep: called with the winner before the runner closes; what it returns is added to the summary.
      data: fingerprints of the splits that the runner trains and scores on; None where it knows none.
      accept_changed_data: go on where the training or the validation split is not what it was; otherwise refused.
      costs: counts what a configuration costs, where ``search.objectives`` or ``search.where`` name a counted cost.

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
        search: SearchConfig | Settings,
        runner: TrialRunner,
        *,
        start: Sequence[Mapping[str, Any]] = (),
        direction: Direction = "min",
        reference: Mapping[str, Any] | None = None,
        base: Mapping[str, Any] | None = None,
        reference_config: Mapping[str, Any] | None = None,
        known_keys: Iterable[str] | None = None,
        on_event: Event | None = None,
        should_stop: ShouldStop = never,
        keep: Callable[[Trial], Mapping[str, Any]] | None = None,
        data: Fingerprints | None = None,
        accept_changed_data: bool = False,
        costs: Count | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.runner = runner
        settings = (
            search
            if isinstance(search, Settings)
            else Settings.by_hand(
                search,
                direction=direction,
                reference=reference,
                base=base,
                reference_config=reference_config,
                known_keys=known_keys,
            )
        )
        self.settings = settings.begun(
            first_record(self.run_dir), lambda overrides: runner.total_steps(Trial(0, dict(overrides), self.run_dir))
        )
        self.search, self.space, seed = self.settings.search, self.settings.space, self.settings.search.seed
        self.start = [dict(one) for one in start]
        # The first trials are proposed before anything is scored: they are all design.
        initial = max(self.search.initial, runner.capacity + 1)
        assert self.search.acquisition is not None, "a search that has begun names its acquisition"
        rules = self.settings.rules
        self._method = make_method(
            self.search.method, self.space, seed=seed, initial=initial, acquisition=self.search.acquisition, rules=rules
        )
        # Whatever proposes, scores are weighed by the Gaussian process.
        self._surrogate = Surrogate(self.space, seed=seed, initial=initial, rules=rules)
        budget = Budget.of(self.settings, runner)
        budget.check(Trial(0, dict(self.settings.reference), self.run_dir))
        self._enough = Enough(budget, self._surrogate)
        self._allowance = allowance(self.space, self.search, costs)
        objectives = None
        if self.search.objectives or self.search.where:
            objectives = self.settings.objectives
            self._method = Several(self._method, self._allowance, seed=seed)
        self._scores = Scores(self.space, self.settings.reference_point, self.settings.goal.sign, objectives)
        self.reference_in_space = self.settings.reference_point is not None
        self._data, self._accept_changed_data = dict(data or {}), accept_changed_data
        self._on_event, self._should_stop, self._keep = on_event, should_stop, keep
        if not self.search.fixed:  # else it depends on what was tried before
            self._check_room({0: self.settings.reference_point})

    def _check_room(self, points: Mapping[int, Point | None]) -> None:
        check_room(self.space, self.search.trials, points)
        self._allowance.check_room(self.search.trials, points)

    def run(self) -> StudySummary | None:
        """Runs the study to its end, or continues it.

        Returns:
          The summary, as written to ``summary.json``; None where the study was stopped before its end.

        Raises:
          UserError: another process holds the study, the journal is damaged or belongs to another study, the data have
            changed, the fraction is less than a step, or every trial diverged.
        """
        with Ledger(self.run_dir, on_event=self._on_event, should_stop=self._should_stop) as self._ledger:
            self._open()
            self._history = self._ledger.history
            self._loop = TrialLoop(self.settings, self.runner, self._method, self._scores, self._ledger)
            self._climb = Climb(self.settings, self._ledger, self._loop, self._scores, self._surrogate)
            try:
                self._score_trials()
                self._climb.to_the_end()
                repeat(self.settings, self._ledger, self.runner)
                best = self._best()
                self._test(best)
                kept = self._keep(best.trial) if self._keep is not None else {}
            except Interrupted:
                return None
            finally:
                self.runner.close()
            seen = self._scores.at(self._history.trials)
            summary = build_summary(
                self._history,
                best,
                objectives=self.settings.objectives,
                shares=self.settings.shares,
                top_k=self.search.promote,
                seeds=self.search.seeds,
                posterior=self._surrogate.fit([observation for _, observation in seen]),
                reference_in_space=self.reference_in_space,
            )
            summary |= kept
            write_summary(self.run_dir, summary)
            self._ledger.emit("summary", best.trial.id, summary)
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

    def _open(self) -> None:
        """Checks that the journal is this study's, or starts it, and reads it back."""

        def check(history: History) -> None:
            points = {number: self._scores.point(state) for number, state in history.trials.items()}
            self._check_room({0: self.settings.reference_point} | points)
            for state in history.trials.values():
                state.costs = state.costs or self._allowance.counted(state.trial.configuration)

        self._ledger.open(
            # The population of one process: a study may go on over more workers, or fewer.
            self.settings.header(population=self.runner.capacity // self.search.workers, start=self.start),
            f"the study in {self.run_dir}",
            section="search.",
            space=self.space,
            check=check,
            data=self._data,
            accept_changed_data=self._accept_changed_data,
        )

    # Early scores

    def _score_trials(self) -> None:
        """Proposes and scores every trial that the journal does not have yet."""
        self._loop.settle()
        trials, order = self._history.trials, self._loop.order
        waiting = sorted(
            (state for state in trials.values() if not (state.ended or state.waits)),
            key=lambda state: self._history.legs[state.trial.id],
        )
        with Proposals(self._method, self.settings.reference, self.start) as proposals:

            def take() -> TrialState:
                state = waiting.pop(0) if waiting else self._propose(proposals.take(self._request(len(trials))))
                if self._proposes:
                    proposals.prepare(self._request(len(trials)))
                return state

            def following(running: set[int]) -> Callable[[], TrialState] | None:
                return take if waiting or (self._proposes and not order.behind) else None

            self._loop.train("early", following, proposing=True)
        self._climb.to_the_fraction()
        if not any(state.ranked for state in trials.values()):
            raise UserError(self._all_diverged())

    @property
    def _proposes(self) -> bool:
        """Whether there is to be another trial."""
        history = self._history
        count = len(history.trials)
        if history.enough is None and 0 < count < self.search.trials:
            why = self._enough.reason(history, history.trials[count - 1].known, self._request)
            if why is not None:
                self._ledger.append("enough", trial=None, trials=count, **why)
        return history.enough is None and count < self.search.trials

    def _request(self, number: int) -> Request:
        """What the proposal of a trial may know (see the module's text)."""
        known = self._history.trials
        before = set(known[number - 1].known) if number else set()
        first = (lambda trial: self._loop.milestones(trial).rungs[0]) if self.search.ladder else None
        told = [(index, seen) for index, seen in self._scores.told(known, first) if index in before]
        pending = [
            (index, point)
            for index in sorted(known)
            if index not in before and (point := self._scores.point(known[index])) is not None
        ]
        return Request(number, told, pending)

    def _propose(self, proposed: Proposed) -> TrialState:
        costs = self._allowance.counted(proposed.proposal.configuration)
        further: dict[str, Any] = {"costs": costs} if costs else {}
        if (dropped := proposed.proposal.prior_dropped) is not None and self._history.prior_dropped is None:
            further["prior_dropped"] = dropped
        self._ledger.append("proposed", **proposed.fields(), **further)
        return self._history.trials[proposed.request.trial]

    # The end

    def _best(self) -> TrialState:
        best = leader(self._history, self.settings.objectives, ended=True)
        if best is None:
            raise UserError(self._all_diverged())
        return best

    def _all_diverged(self) -> str:
        rates = [key for key in self.space.keys if key.endswith("learning_rate")]
        advice = f"lower the upper bound of search.space.{rates[0]}" if rates else "lower optimizer.learning_rate"
        return (
            f"all {self.search.trials} trials diverged (loss or score became NaN or infinite), the reference included; "
            f"{advice}, or set optimizer.clip_norm; {self._ledger.path} keeps the trials"
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
            if self._ledger.test(state, self.runner) is None:
                return
