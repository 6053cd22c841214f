"""What a new study begins with where nothing is said, and what one that has begun goes on with."""

from __future__ import annotations

import json

import pytest
from synthetic import REFERENCE, SPACE, SyntheticRunner, interrupt_at, records, search_config

from jaxtune.search import Study
from jaxtune.search.beginning import UNSET, why_straight
from jaxtune.search.settings import Settings

UNSAID = dict.fromkeys(UNSET)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is put on the disk for good, and no summary explains anything."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("jaxtune.search.surrogate.Surrogate.fit", lambda self, observations: None)


def begun(steps=50, **changes) -> Settings:
    """The settings of a new study whose trials take so many steps."""
    settings = Settings.by_hand(search_config(**{**UNSAID, **changes}), reference=REFERENCE)
    return settings.begun(None, lambda overrides: overrides.get("train.steps", steps))


def test_a_new_study_draws_and_finishes_in_rungs_by_score():
    settings = begun()
    assert [getattr(settings.search, name) for name in UNSET] == ["thompson", [0.4, 1.0], "score"]
    assert settings.straight is None
    assert settings.promotions == (4, 2), "3 × 0.8 full trainings buy 4 × 0.2 + 2 × 0.6, and nothing nearer"


@pytest.mark.parametrize(
    ("changes", "steps", "reason", "promoted_by"),
    [
        ({"fraction": 0.4}, 50, "search.fraction 0.4 leaves no rung at 0.4", "score"),
        ({"fraction": 0.5}, 50, "search.fraction 0.5 leaves", "score"),
        ({"promote": 1}, 50, "of one promoted trial", "score"),
        ({}, 3, "a trial of 3 steps has no step of its own for a rung at 0.4", "score"),
        ({"fraction": 0.38}, 20, "a trial of 20 steps", "score"),
        ({"ladder": [0.1]}, 50, "search.ladder stops trials on the way already", "mean"),
        ({"method": "hyperband"}, 50, "search.method hyperband stops", "mean"),
    ],
)
def test_where_a_rung_has_no_place_the_end_is_next_and_the_reason_told(changes, steps, reason, promoted_by):
    settings = begun(steps, **changes)
    assert (settings.search.finish, settings.search.promote_by) == ([1.0], promoted_by)
    assert settings.straight is not None
    assert settings.straight.startswith(reason)
    assert why_straight(settings.search, lambda: steps) == settings.straight
    settings.milestones(steps)  # and the steps are fit to be trained


def test_the_shortest_trial_of_the_space_decides():
    space = {**SPACE, "train.steps": {"integer": (3, 50)}}
    assert begun(space=space).straight == "a trial of 3 steps has no step of its own for a rung at 0.4"
    assert begun(space={**SPACE, "train.steps": {"choice": [50, 10]}}).straight is None


def test_what_is_said_is_done():
    settings = begun(finish=[0.5, 0.7, 1.0], promote_by="mean", acquisition="ei", fraction=0.4)
    assert [getattr(settings.search, name) for name in UNSET] == ["ei", [0.5, 0.7, 1.0], "mean"]
    assert settings.straight is None
    assert begun(finish=[1.0], promote=1).straight is None, "it was asked for"


def study(run_dir, runner=None, **changes) -> Study:
    search = search_config(**{**UNSAID, "method": "random", "trials": 9, **changes})
    return Study(run_dir, search, runner or SyntheticRunner(divergence=1.0), reference=REFERENCE, base={})


def promoted(run_dir, leg):
    return [one["trial"] for one in records(run_dir) if one["event"] == "promoted" and one["leg"] == leg]


def test_scores_promote_unless_the_mean_is_asked_for(tmp_path, monkeypatch):
    # A process that would promote the worst.
    monkeypatch.setattr(
        "jaxtune.search.surrogate.Surrogate.promotion_estimates",
        lambda self, observations: [-one.score for one in observations],
    )
    assert study(tmp_path / "score").run() is not None
    assert study(tmp_path / "mean", promote_by="mean").run() is not None
    told = records(tmp_path / "score")
    early = {one["trial"]: one["score"] for one in told if one["event"] == "scored" and one["trial"]}
    order = sorted(early, key=early.__getitem__)
    assert promoted(tmp_path / "score", 0) == order[:4]
    assert promoted(tmp_path / "mean", 0) == order[::-1][:4]
    for name in ("score", "mean"):
        at_rung = {one["trial"]: one["score"] for one in records(tmp_path / name) if one["event"] == "reported"}
        others = [number for number in at_rung if number]
        assert promoted(tmp_path / name, 1) == sorted(others, key=at_rung.__getitem__)[:2], (
            "scores, whatever came before"
        )
    assert [one["estimate"] for one in told if one["event"] == "promoted" and not one["leg"]] == [
        early[number] for number in order[:4]
    ]


def test_a_study_from_before_there_was_a_choice_goes_on_straight_and_by_mean(tmp_path):
    old = {"acquisition": "ei", "finish": [1.0], "promote_by": "mean"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert study(whole, **old).run() is not None
    runner = SyntheticRunner(divergence=1.0)
    runner.before = interrupt_at(5, 10)
    assert study(parts, runner, **old).run() is None
    path = parts / "trials.jsonl"
    first, *rest = path.read_text().splitlines()
    header = json.loads(first)
    assert {name: header.pop(name) for name in UNSET} == old
    path.write_text("\n".join([json.dumps(header), *rest]) + "\n")
    went_on = study(parts)
    assert {name: getattr(went_on.search, name) for name in UNSET} == old
    assert went_on.settings.straight is None
    assert went_on.run() is not None
    assert records(parts)[1:] == records(whole)[1:]
