"""Several objectives and bounds, against brute force, and in studies over a runner that trains nothing."""

from __future__ import annotations

import json
import math
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from synthetic import REFERENCE, SPACE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.cli.study.status import text
from jaxtune.config.search_section import BoundConfig, SearchConfig
from jaxtune.errors import UserError
from jaxtune.reports import write_report
from jaxtune.search import Outcome, Study, StudySummary, Trial
from jaxtune.search.allowance import Allowance
from jaxtune.search.objectives import Objectives, bounds_in_words, violation
from jaxtune.search.observation import Observation
from jaxtune.search.scalarisation import chebyshev, scalarised, weights
from jaxtune.search.space import Space
from jaxtune.search.status import read_status
from jaxtune.search.table import trials
from tests.told_types import check_types

ranks = st.integers(0, 3)
two = Objectives(("exact_match", "adapter_bytes"), {}, Objectives.of(SearchConfig(objective="f1")).goal)


def count(configuration) -> dict[str, float]:
    """Bytes by rank alone."""
    return {"adapter_bytes": 1000.0 * configuration.get("update.0.rank", 16), "flops": 1e12}


class Sized(SyntheticRunner):
    """Measures exact match as well: high ranks answer better."""

    def run(self, trial: Trial, until: int) -> Outcome:
        outcome = super().run(trial, until)
        found = math.log2(trial.configuration["update.0.rank"]) / 10
        return Outcome(
            outcome.score, outcome.standard_error, until, 0.5, {**outcome.metrics, "exact_match": found},
            diverged=outcome.diverged,
        )  # fmt: skip


def study(run_dir, runner=None, **search) -> Study:
    return Study(
        run_dir, search_config(**search), runner or Sized(), reference=REFERENCE, base={"name": "test"}, costs=count
    )


@given(st.lists(st.tuples(ranks, ranks), max_size=8))
def test_the_front_is_of_those_that_none_beats(rows):
    values: dict[int, dict[str, float | None]] = {
        n: {"exact_match": float(match), "adapter_bytes": float(size)} for n, (match, size) in enumerate(rows)
    }
    beaten = {
        n
        for n, (match, size) in enumerate(rows)
        for match_, size_ in rows
        if match_ >= match and size_ <= size and (match_ > match or size_ < size)
    }
    assert two.front(values) == [n for n in values if n not in beaten]
    values[99] = {"exact_match": None, "adapter_bytes": 0.0}
    assert 99 not in two.front(values)


def test_bounds_are_strict_and_told_by_how_much():
    where = {"adapter_bytes": BoundConfig(below=8e6), "exact_match": BoundConfig(above=0.2, below=0.9)}
    assert violation(where, {"adapter_bytes": 7e6, "exact_match": 0.5}) == (0, 0.0)
    assert violation(where, {"adapter_bytes": 8e6, "exact_match": 0.5}) == (1, 0.0)
    assert violation(where, {"adapter_bytes": 12e6, "exact_match": 0.1}) == (2, pytest.approx(1.0))
    assert violation(where, {"adapter_bytes": 1e6, "exact_match": None})[1] == math.inf
    words = "adapter_bytes below 8,000,000 and exact_match above 0.2 and exact_match below 0.9"
    assert bounds_in_words(where) == words


@given(st.lists(st.tuples(*[st.floats(-10, 10)] * 3), min_size=1, max_size=9), st.integers(0, 99))
def test_the_chebyshev_function_is_that_of_its_definition(rows, trial):
    values, chosen = np.array(rows), weights(3, seed=7, trial=trial)
    assert chosen.sum() == pytest.approx(1)
    np.testing.assert_array_equal(chosen, weights(3, seed=7, trial=trial))
    expected = []
    for row in rows:
        parts = []
        for place, weight in enumerate(chosen):
            column = sorted(one[place] for one in rows)
            at = 0.75 * (len(column) - 1)
            quartile = column[int(at)] + (at - int(at)) * (column[math.ceil(at)] - column[int(at)])
            scale = quartile - column[0] if quartile > column[0] else column[-1] - column[0]
            parts.append(weight * (row[place] - column[0]) / (scale or 1.0))
        expected.append(max(parts) + 0.05 * sum(parts))
    np.testing.assert_allclose(chebyshev(values, chosen), expected, rtol=1e-6, atol=1e-9)


def test_what_violates_bounds_counts_as_worse_and_one_objective_stays_as_it_is():
    plain = [Observation([0], 1.0, 0.1), Observation([1], None)]
    assert scalarised(plain, seed=0, trial=9) == plain
    told = [
        Observation([0], 1.0, objectives=(1.0, 5.0)),
        Observation([1], 0.5, objectives=(0.5, 1.0), violation=(1, 0.3)),
        Observation([2], 0.6, objectives=(0.6, 1.0), violation=(1, 0.1)),
        Observation([3], None, objectives=(None, 2.0)),
        Observation([4], 0.7, objectives=(0.7, None)),
    ]
    for trial in range(5):
        first, second, third, diverged, unknown = (one.score for one in scalarised(told, seed=0, trial=trial))
        assert diverged is None
        assert unknown is None
        assert first is not None
        assert second is not None
        assert third is not None
        assert first < third < second
    # Bounds with one objective: the score itself, but for those that violate them.
    alone = [Observation([0], 1.0, objectives=(1.0,)), Observation([1], 0.5, objectives=(0.5,), violation=(1, 0.3))]
    kept, violating = scalarised(alone, seed=0, trial=1)
    assert kept.score == 1.0
    assert violating.score == pytest.approx(1.0 + 0.3 * 0.5)


def space(**changes) -> Space:
    return Space(search_config(**changes).space)


def test_an_allowance_finds_what_fits_and_refuses_what_does_not():
    where = {"adapter_bytes": BoundConfig(below=6e3, above=3e3)}
    here = Allowance(space(), where, count)
    assert here.counted(REFERENCE) == {"adapter_bytes": 16e3}
    point = space().point(REFERENCE)
    assert point is not None
    assert not here.allows(point)
    near = here.fitted(point, set(), seed=0, trial=1)
    assert space().configuration(near) == {**REFERENCE, "update.0.rank": 4}, "the one coordinate that decides"
    other = here.fitted(point, {tuple(near)}, seed=0, trial=1)
    assert other != near
    assert here.allows(other)
    wide = Allowance(space(), {"adapter_bytes": BoundConfig(below=15e3)}, count)
    spread = [wide.fitted(point, set(), seed=0, trial=trial, spread=True) for trial in range(9)]
    assert {space().configuration(one)["update.0.rank"] for one in spread} == {2, 4, 8}, "what is left is filled"
    with pytest.raises(UserError, match=r"where\.adapter_bytes: no .* below 2,000; the nearest has .* 2,000 .*rank=2"):
        Allowance(space(), {"adapter_bytes": BoundConfig(below=2e3)}, count)
    with pytest.raises(UserError, match=r"flops above .*which no searched key decides"):
        Allowance(space(), {"flops": BoundConfig(above=1e13)}, lambda _: {"flops": 1e12})


@pytest.mark.parametrize("seed", range(6))
def test_two_bounds_that_pull_apart_are_met_where_they_can_be(seed):
    generator = np.random.default_rng(seed)
    keys = ("update.0.rank", "train.batch_size", "train.steps")
    prices = generator.uniform(0.5, 2, 3)

    def priced(configuration) -> dict[str, float]:
        sizes = [configuration.get(key, 1) for key in keys]
        return {"adapter_bytes": sizes[0] * prices[0], "flops": sizes[0] * prices[1] + sizes[1] * sizes[2] * prices[2]}

    wide = space(space={key: {"integer": (1, 4)} for key in keys} | {"optimizer.learning_rate": {"uniform": (0, 1)}})
    low, high = generator.uniform(0, 8), generator.uniform(1, 30)
    where = {"adapter_bytes": BoundConfig(above=low), "flops": BoundConfig(below=high)}
    grid = [dict(zip(keys, (a, b, c), strict=True)) for a in range(1, 5) for b in range(1, 5) for c in range(1, 5)]
    if any(violation(where, priced(one)) == (0, 0.0) for one in grid):
        found = Allowance(wide, where, priced).fitted([1, 1, 1, 0.5], set(), seed=0, trial=1)
        assert violation(where, priced(wide.configuration(found))) == (0, 0.0)
    else:
        with pytest.raises(UserError, match="no configuration"):
            Allowance(wide, where, priced)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A finished study of two objectives with a bound, in one go: its directory and its summary."""
    directory = tmp_path_factory.mktemp("several")
    summary = study(directory, **SEVERAL).run()
    return directory, summary


SEVERAL = {
    "objectives": ["loss", "adapter_bytes"],
    "where": {"adapter_bytes": {"below": 20e3}, "exact_match": {"above": 0.15}},
    "trials": 9,
}


def test_a_study_of_several_objectives(several):
    directory, summary = several
    check_types(StudySummary, summary)
    header, *told = records(directory)
    assert header["objectives"] == ["loss", "adapter_bytes"]
    assert header["where"] == SEVERAL["where"]
    proposed = [record for record in told if record["event"] == "proposed"]
    assert {record["source"] for record in proposed} == {"reference", "design", "surrogate"}
    for record in proposed:
        rank = record["configuration"]["update.0.rank"]
        assert record["costs"] == {"adapter_bytes": 1000.0 * rank}
        assert rank < 20
    values = {one["id"]: (one["values"]["loss"], one["values"]["adapter_bytes"]) for one in summary.trials}
    satisfied = {n: own for n, own in values.items() if own[0] is not None and own[1] > 2 ** (1.5) * 1000}
    beaten = {n for n, own in satisfied.items() for o in satisfied.values() if o != own and o[0] <= own[0] and o[1] <= own[1]}  # fmt: skip  # noqa: E501
    assert {entry["trial"] for entry in summary.pareto} == satisfied.keys() - beaten
    losses = [entry["values"]["loss"] for entry in summary.pareto]
    assert losses == sorted(losses)
    finals = {
        one["id"]: one["final_score"]
        for one in summary.trials
        if one["final_score"] is not None and one["id"] in satisfied
    }
    assert summary.best["trial"] == min(finals, key=lambda number: finals[number])
    assert summary.where["satisfied"]
    assert summary.where["best"]["exact_match"] > 0.15
    status = read_status(directory)
    assert status.front == [entry["trial"] for entry in summary.pareto]
    assert (status.best, status.satisfied) == (summary.best["trial"], True)
    assert status.as_dict()["objectives"] == ["loss", "adapter_bytes"]
    assert status.trials[1].values["adapter_bytes"] == values[1][1]
    front = ", ".join(str(entry["trial"]) for entry in summary.pareto)
    assert f"Pareto front at the fraction: trials {front}" in text(status)
    assert trials(directory)[1]["costs.adapter_bytes"] == values[1][1]


def test_the_page_draws_the_front_and_tells_of_the_bounds(several):
    directory, summary = several
    page = write_report(directory).read_text()
    section = page[page.index('id="trade-offs"') : page.index('id="early"')]
    for row in re.findall(r"<tr>(<td>.*?)</tr>", section):
        number, _, on, *_ = re.findall(r"<td>(.*?)</td>", row)
        assert (on == "yes") == (int(number) in {entry["trial"] for entry in summary.pareto})
    assert "best-so-far" in section
    assert "Of the trials with adapter_bytes below 20,000 and exact_match above 0.15 it is the best." in page


def test_a_study_that_was_stopped_repeats_its_proposals(several, tmp_path):
    runner = Sized()
    runner.before = interrupt_at(7, 10)
    assert study(tmp_path, runner, **SEVERAL).run() is None
    assert study(tmp_path, **SEVERAL).run() == json.loads((several[0] / "summary.json").read_text())
    assert records(tmp_path) == records(several[0])
    changed = {**SEVERAL, "where": {"adapter_bytes": {"below": 30e3}}}
    with pytest.raises(UserError, match=r"search\.where"):
        study(tmp_path, **changed).run()


def test_where_no_trial_meets_a_measured_bound_the_nearest_is_best_and_said_so(tmp_path):
    summary = study(tmp_path, objective="loss", where={"exact_match": {"above": 0.8}}, trials=6, promote=2).run()
    assert summary is not None
    assert summary.where is not None
    assert not summary.where["satisfied"]
    finished = [one for one in summary.trials if one["status"] == "finished"]
    highest = max(one["configuration"]["update.0.rank"] for one in finished)
    assert summary.best["configuration"]["update.0.rank"] == highest
    # Those that come nearest are finished, though others have lower losses.
    by_rank = sorted((-one["configuration"]["update.0.rank"], one["id"]) for one in summary.trials if one["id"])
    assert highest == -by_rank[0][0] or any(one["status"] == "failed" for one in summary.trials)
    assert summary.pareto == []
    status = read_status(tmp_path)
    assert status.satisfied is False
    assert "has exact_match above 0.8: the best violates it least" in text(status)
    assert "No finished trial has exact_match above 0.8; this one" in write_report(tmp_path).read_text()


def test_too_few_configurations_within_the_bounds_are_told(tmp_path):
    small = {"update.0.rank": {"power_of_two": (2, 64)}, "optimizer.schedule": SPACE["optimizer.schedule"]}
    with pytest.raises(UserError, match=r"only 3 further configurations with adapter_bytes below 5,000; .* to 4"):
        Study(
            tmp_path, search_config(space=small, where={"adapter_bytes": {"below": 5e3}}),
            Sized(), reference={"update.0.rank": 4, "optimizer.schedule": "cosine"}, costs=count,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ["adapter_bytes", "loss"]}, "adapter_bytes is counted and needs no training"),
        ({"objectives": ["loss", "loss"]}, "names an objective twice"),
        ({"objective": "f1", "objectives": ["loss", "flops"]}, "objective is f1, but objectives begin with loss"),
        ({"where": {"flops": {}}}, "give below, above or both"),
        ({"where": {"flops": {"below": 1, "above": 2}}}, "nothing is above 2.0 and below 1.0"),
    ],
)
def test_objectives_that_are_none_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        search_config(**changes)


def test_one_objective_in_a_list_is_that_objective():
    assert search_config(objectives=["f1"]) == search_config(objective="f1")
    both = search_config(objectives=["exact_match", "flops"], where={"loss": {"below": 2}})
    assert (both.objective, both.named) == ("exact_match", ("exact_match", "flops", "loss"))
    assert (both.counted, both.measured) == (("flops",), ("exact_match", "loss"))
    assert SearchConfig.model_validate(both.model_dump()) == both
