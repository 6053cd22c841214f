"""When a study ends before its trials do: what a budget counts, what a gain is compared with, what a restart does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import REFERENCE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.config.search_section import BudgetConfig, DimensionConfig
from jaxtune.errors import UserError
from jaxtune.reports.headline import ended_sentence
from jaxtune.reports.records import read_study
from jaxtune.search import Outcome, Study, Trial
from jaxtune.search.enough import Budget
from jaxtune.search.milestones import milestones
from jaxtune.search.observation import Observation
from jaxtune.search.space import Space
from jaxtune.search.surrogate import Surrogate
from jaxtune.search.trial import History, TrialState


def history(*steps_run: int, diverged: tuple[int, ...] = ()) -> History:
    """Trials that ran so many steps; 0 is on its way."""
    states = {}
    for number, steps in enumerate(steps_run):
        early = Outcome(1.0, 0.1, steps, 2.0 * steps, {}, diverged=number in diverged) if steps else None
        states[number] = TrialState(Trial(number, {}, Path()), total_steps=50, early=early)
    return History(states)


def budget(**settings) -> Budget:
    search = search_config(**settings)
    return Budget(search, lambda trial: milestones(search, 50), lambda trial: 3.0 if trial.id else 5.0)


def test_what_is_owed_counts():
    """Fifty steps, scored after ten; three and the reference are finished."""
    plain = budget(promote=3)
    nothing = plain.spent(History(), (), 8)
    assert nothing["steps"] == 8 * 10 + 4 * 40
    # Of two trials one can be finished beside the reference.
    assert plain.spent(History(), (), 2)["steps"] == 2 * 10 + 2 * 40
    assert plain.spent(History(), (), 1)["steps"] == 50
    # A trial that diverged took fewer steps, once that may be known.
    seen = history(10, 4, 0, diverged=(1,))
    assert plain.spent(seen, {0, 1}, 4)["steps"] == 10 + 4 + 10 + 10 + 4 * 40
    assert plain.spent(seen, {0}, 4)["steps"] == 4 * 10 + 4 * 40
    assert plain.spent(seen, {0, 1}, 4)["flops"] == 10 * 5 + (4 + 10) * 3 + (10 + 4 * 40) * 5
    # Two seconds a step so far.
    assert plain.spent(seen, {0, 1}, 4)["seconds"] == 2 * plain.spent(seen, {0, 1}, 4)["steps"]


def test_on_a_ladder_half_of_the_trials_go_on():
    ladder = budget(promote=1, ladder=[0.1, 0.2], fraction=0.4)
    # Nine to step 5, the reference and four to 10, the reference and two to 20, the reference and one to 50.
    assert ladder.spent(History(), (), 9)["steps"] == 9 * 5 + 5 * 5 + 3 * 10 + 2 * 30


def test_finishing_in_rungs_and_with_other_seeds_counts():
    """Five at one rung's cost: eight to step 20, four of them to 50; then three of the last five again, twice."""
    rungs = budget(trials=12, promote=5, finish=[0.4, 1.0], seeds=3)
    assert rungs.spent(History(), (), 12)["steps"] == 12 * 10 + 9 * 10 + 5 * 30 + 2 * 3 * 50


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 49}, "search.budget.steps: 49 is less than the 50 of one trial, the reference"),
        ({"flops": 100.0}, "search.budget.flops: 100 is less than the 250 of one trial"),
    ],
)
def test_a_budget_below_one_trial_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        budget(budget=BudgetConfig(**given)).check(Trial(0, {}, Path()))
    budget(budget=BudgetConfig(steps=50, flops=250.0)).check(Trial(0, {}, Path()))


def test_flops_that_nobody_counts_are_no_budget():
    search = search_config(budget=BudgetConfig(flops=1e12))
    with pytest.raises(UserError, match="give steps or seconds"):
        Budget(search, lambda trial: milestones(search, 50)).check(Trial(0, {}, Path()))


def test_a_gain_is_below_the_noise_where_scores_are_noise_and_above_it_where_they_are_not():
    space = Space({"x": DimensionConfig(uniform=(0.0, 1.0)), "y": DimensionConfig(uniform=(0.0, 1.0))})
    generator = np.random.default_rng(0)
    points = [[float(x), float(y)] for x, y in generator.random((14, 2)).round(6)]

    def gain(scores, error):
        told = [
            Observation(space.snap(point), float(score), error) for point, score in zip(points, scores, strict=True)
        ]
        found = Surrogate(space, seed=0, initial=4).gain(14, told, [])
        assert found is not None
        return found

    noisy, noise = gain(1.0 + 0.1 * generator.standard_normal(14), 0.1)
    assert noisy < noise
    assert 0 < noise <= 0.1 + 1e-9
    # A slope that the best point so far is far from the end of.
    sloping, exact = gain([1.0 + point[0] + point[1] for point in points], 1e-4)
    assert sloping > exact
    # In units of the score.
    scaled, error = gain([10 * (1.0 + point[0] + point[1]) for point in points], 1e-3)
    assert (scaled, error) == pytest.approx((10 * sloping, 10 * exact), rel=0.02)


def study(run_dir, runner=None, **settings) -> Study:
    search = search_config(**{"promote": 2, **settings})
    return Study(run_dir, search, runner or SyntheticRunner(), reference=REFERENCE, base={"name": "test"})


def proposed(run_dir: Path) -> int:
    return sum(record["event"] == "proposed" for record in records(run_dir))


def test_a_study_ends_with_its_budget_and_a_restart_agrees(tmp_path):
    """Six early scores and three ends cost 60 + 120 steps; a seventh trial would not fit."""
    limit = {"trials": 12, "budget": BudgetConfig(steps=185)}
    summary = study(tmp_path / "whole", **limit).run()
    assert summary is not None
    assert summary["ended"] == "budget"
    assert len(summary["trials"]) == proposed(tmp_path / "whole") == 6
    assert summary["budget"]["steps_run"] <= 185
    assert sum(trial["final_score"] is not None for trial in summary["trials"]) == 3
    # What a dry run foretells.
    whole, trial = study(tmp_path / "foretold", **limit), Trial(0, REFERENCE, tmp_path)
    assert Budget.of(whole.settings, whole.runner).trials(trial) == 6
    assert (
        Budget.of(study(tmp_path, trials=4, budget=BudgetConfig(steps=500)).settings, whole.runner).trials(trial) == 4
    )
    assert Budget.of(study(tmp_path, budget=BudgetConfig(seconds=5)).settings, whole.runner).trials(trial) is None
    (told,) = [record for record in records(tmp_path / "whole") if record["event"] == "enough"]
    assert (told["reason"], told["budget"], told["limit"], told["with_another"]) == ("budget", "steps", 185, 190)
    assert "after 6 of 12 trials" in (words := ended_sentence(read_study(tmp_path / "whole")))
    assert "would take 190 steps, finishing included, of 185" in words
    for at, until in ((4, 10), (0, 50)):
        runner = SyntheticRunner()
        runner.before = interrupt_at(at, until)
        assert study(tmp_path / "parts", runner, **limit).run() is None
    assert study(tmp_path / "parts", **limit).run() is not None
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


def test_seconds_end_a_study_and_what_was_decided_stays(tmp_path):
    """Half a second a call, so that a clock's budget is a number of calls here."""
    limit = {"trials": 30, "budget": BudgetConfig(seconds=8.0)}
    summary = study(tmp_path, **limit).run()
    assert summary is not None
    assert summary["ended"] == "budget"
    count = proposed(tmp_path)
    assert 1 < count < 30
    (tmp_path / "summary.json").unlink()
    slower = SyntheticRunner()
    slower.steps = 50
    again = study(tmp_path, slower, **limit).run()
    assert again is not None
    assert (again["ended"], proposed(tmp_path)) == ("budget", count)


def test_a_study_ends_where_scores_are_all_noise(tmp_path):
    class Flat(SyntheticRunner):
        def floor(self, configuration):
            return 0.4

    flat = Flat(noise=0.05, divergence=1.0)
    summary = study(tmp_path / "flat", flat, trials=20, terminate="gain").run()
    assert summary is not None
    assert summary["ended"] == "terminator"
    assert 10 <= len(summary["trials"]) < 20
    (told,) = [record for record in records(tmp_path / "flat") if record["event"] == "enough"]
    assert told["gain"] < told["noise"]
