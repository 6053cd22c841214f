"""A searched method: which of the other searched keys apply to a trial, what is written of it, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import SyntheticRunner, interrupt_at, records

from jaxtune.config import Config, with_overrides
from jaxtune.errors import UserError
from jaxtune.reports.formatting import ABSENT
from jaxtune.reports.page import trial_row, write_report
from jaxtune.reports.records import read_study
from jaxtune.search import Study
from jaxtune.search.checks import check_space
from jaxtune.search.methods import make_method
from jaxtune.search.observation import Observation
from jaxtune.search.settings import Settings
from jaxtune.search.table import trials

METHOD, RANK, RATIO = "update.0.method", "update.0.rank", "update.0.ratio"
SPACE = {
    "optimizer.learning_rate": {"log_uniform": [1e-4, 4e-3]},
    METHOD: {"choice": ["low_rank", "lora_plus", "ia3"]},
    RANK: {"power_of_two": [2, 8]},
    RATIO: {"choice": [1.0, 4.0, 16.0]},
}


def config(space=None, rule=None, **search) -> Config:
    update = [{"match": "layers.*.attention.{q,v}", "method": "low_rank", **(rule or {})}]
    data = {"train": "rows.jsonl", "validation": "rows.jsonl", "prompt": "{a}", "completion": "{b}"}
    section = {"space": SPACE if space is None else space, "trials": 8, "promote": 2, "initial": 5, **search}
    return Config.model_validate(
        {"model": {"path": "none"}, "data": data, "train": {"steps": 50}, "update": update, "search": section}
    )


SPACE_OF_METHODS = Settings.of(config()).space


def test_keys_apply_where_the_method_has_them():
    space = SPACE_OF_METHODS
    expected = {"low_rank": {RANK}, "lora_plus": {RANK, RATIO}, "ia3": set()}
    for method, keys in expected.items():
        assert {key for key in (RANK, RATIO) if space.applies(key, {METHOD: method})} == keys
        assert set(space.configuration(space.snap([1e-3, list(expected).index(method), 2, 1]))) == keys | {
            METHOD,
            "optimizer.learning_rate",
        }
    assert space.alone(RATIO, 4.0) == {METHOD: "lora_plus", RATIO: 4.0}
    # What all choices have needs no method beside it.
    assert space.alone("optimizer.learning_rate", 1e-3) == {"optimizer.learning_rate": 1e-3}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_a_configuration_is_one_point(seed):
    space = SPACE_OF_METHODS
    unit = np.random.default_rng(seed).random((2, len(space.dimensions)))
    one, other = (space.at(row) for row in unit)
    assert space.snap(one) == one
    assert space.point(json.loads(json.dumps(space.configuration(one)))) == one
    assert (space.configuration(one) == space.configuration(other)) == (one == other)
    # A key of another method makes it none of the space, and a key that is missing too.
    configuration = space.configuration(one)
    assert space.point({**configuration, RATIO: 4.0, METHOD: "low_rank"}) is None
    assert space.point({**configuration, RATIO: 4.0, METHOD: "lora_plus", RANK: None}) is None


def test_a_finite_space_holds_each_configuration_once():
    finite = {key: value for key, value in SPACE.items() if key != "optimizer.learning_rate"}
    for fixed, size in (({}, 3 + 3 * 3 + 1), ({RATIO: 4.0}, 3 + 3 + 1), ({METHOD: "ia3"}, 1)):
        space = Settings.of(config(finite, fixed=fixed)).space
        points = list(space.points())
        assert space.size == size == len(points)
        texts = {json.dumps(space.configuration(point), sort_keys=True) for point in points}
        assert len(texts) == size


def test_a_study_over_methods(tmp_path):
    found, runner = Settings.of(config()), SyntheticRunner()
    summary = Study(tmp_path / "whole", found, SyntheticRunner()).run()
    assert summary is not None
    runner.before = interrupt_at(6, 10)
    assert Study(tmp_path / "parts", found, runner).run() is None
    Study(tmp_path / "parts", found, SyntheticRunner()).run()
    proposed, again = (
        [line["configuration"] for line in records(tmp_path / name) if line["event"] == "proposed"]
        for name in ("whole", "parts")
    )
    assert proposed == again
    assert {configuration[METHOD] for configuration in proposed} == {"low_rank", "lora_plus", "ia3"}
    for configuration in proposed:
        assert (RATIO in configuration) == (configuration[METHOD] == "lora_plus")
        assert (RANK in configuration) == (configuration[METHOD] != "ia3")
    # What does not apply is none of the table's values, and is shown as absent.
    for row in trials(tmp_path / "whole"):
        assert (row[RATIO] is not None) == (row[METHOD] == "lora_plus")
    assert {entry["key"] for entry in summary["partial_dependence"]} == set(SPACE)
    study = read_study(tmp_path / "whole")
    lacking = next(trial for trial in study.trials if trial.configuration[METHOD] == "ia3")
    assert [cell for cell, _ in trial_row(study, lacking, None)["settings"]][-2:] == [ABSENT, ABSENT]
    assert write_report(tmp_path / "whole").is_file()
    # A journal in which a trial has a key of another method was edited by hand.
    journal = tmp_path / "parts" / "trials.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if line["event"] == "proposed" and line["trial"] == lacking.id:
            line["configuration"][RATIO] = 4.0
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(UserError, match=f"trial {lacking.id} sets 'update.0.ratio', which does not apply to it"):
        Study(tmp_path / "parts", found, SyntheticRunner()).run()


@pytest.mark.parametrize("method", ["random", "sobol", "tpe"])
def test_any_search_method_proposes_what_applies(method):
    if method == "tpe":
        pytest.importorskip("optuna")
    search = make_method(method, SPACE_OF_METHODS, seed=0, initial=4)
    told: list[Observation] = []
    for number in range(1, 13):
        proposal = search.propose(number, told, [])
        point = SPACE_OF_METHODS.point(proposal.configuration)
        assert point is not None
        told.append(Observation(point, float(number % 5), 0.1))
    assert len({tuple(observation.point) for observation in told}) == len(told)


@pytest.mark.parametrize(
    ("space", "rule", "message"),
    [
        (
            {METHOD: ["low_rank", "dorra"]},
            {},
            r"search.space.update.0.method: update.0: unknown method 'dorra'; did you mean .*'dora'",
        ),
        ({METHOD: ["low_rank", ["dora"]]}, {}, r"search.space.update.0.method: .*method"),
        (
            {METHOD: ["low_rank", "pissa"]},
            {"use_rslora": True},
            r"search.space.update.0.method: 'pissa' has no key 'use_rslora', which update.0 sets to True; leave that "
            r"out, or the choice; choose from dora, low_rank",
        ),
        (
            {METHOD: ["low_rank", "dora"], RATIO: [1.0, 2.0]},
            {},
            r"search.space.update.0.ratio: no choice of search.space.update.0.method has such a key; leave it out, or "
            r"add a choice that has; choose from lora_plus",
        ),
        (
            {METHOD: ["low_rank", "dora"], "update.0.ratoi": [1.0, 2.0]},
            {},
            r"the configuration has no key 'update.0.ratoi'",
        ),
        ({RATIO: [1.0, 2.0]}, {}, r"the configuration has no key 'update.0.ratio'"),
    ],
)
def test_wrong_choices(space, rule, message):
    with pytest.raises(UserError, match=message):
        check_space(config({key: {"choice": choices} for key, choices in space.items()}, rule))


def test_another_method_takes_its_own_defaults():
    """What a rule sets itself goes on to hold; what stands at the default of one method is the default of the other."""
    own = config(rule={"rank": 8, "learning_rate_scale": 0.5})
    rule = with_overrides(own, {METHOD: "vera"}).update[0]
    assert (rule.method, rule.rank, rule.learning_rate_scale) == ("vera", 8, 0.5)
    plain = with_overrides(config(), {RATIO: 2.0, METHOD: "lora_plus"}).update[0]
    assert (plain.rank, plain.ratio) == (16, 2.0)
    # What is searched where it applies is no reason to refuse the others, whatever the rule sets.
    assert Settings.of(config(rule={"rank": 8})).space.applies(RANK, {METHOD: "low_rank"})
    assert "rank" not in with_overrides(config(rule={"rank": 8}), {METHOD: "ia3"}).model_dump()["update"][0]
    with pytest.raises(UserError, match="rank"):
        with_overrides(config(), {RANK: 8, METHOD: "ia3"})


def test_other_sections_have_conditions_too():
    """An optimizer's kind is a choice among sections as a rule's method is."""
    space = {"optimizer.kind": {"choice": ["adamw", "sgd"]}, "optimizer.beta2": {"uniform": [0.9, 0.99]}}
    found = Settings.of(config(space)).space
    assert found.applies("optimizer.beta2", {"optimizer.kind": "adamw"})
    assert not found.applies("optimizer.beta2", {"optimizer.kind": "sgd"})
    assert found.size is None
