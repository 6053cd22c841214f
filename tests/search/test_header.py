"""What makes a study this study."""

from __future__ import annotations

import copy

import pytest

from jaxtune.config import load_config, with_overrides
from jaxtune.config.search_section import SearchConfig
from jaxtune.errors import UserError
from jaxtune.search.header import check_header, deciding, study_header

KEPT = {"train.checkpoint_minutes": 1.0, "train.keep.latest": 7, "train.keep.every": 100}


def header(config):
    search = SearchConfig(space={"optimizer.learning_rate": {"log_uniform": (1e-5, 1e-2)}})
    base = config.model_dump(mode="json")
    return study_header(search, population=1, direction="min", reference={}, start=(), base=base, rules=1)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("{model: {path: m}, data: {train: t.jsonl, completion: '{x}'}, train: {steps: 3}}")
    return load_config(path)


def test_what_is_kept_of_trials_makes_no_other_study(config, tmp_path):
    first = {"event": "study", **header(config)}
    assert {"checkpoint_minutes", "keep"}.isdisjoint(first["config"]["train"])
    changed = with_overrides(config, KEPT)
    assert deciding(changed) == deciding(config)
    check_header([first], header(changed), tmp_path / "trials.jsonl")
    # A journal that does name them, as a copy of the whole configuration would.
    named = copy.deepcopy(first)
    named["config"]["train"] |= {"checkpoint_minutes": 9.0, "keep": {"latest": 3}}
    check_header([named], header(config), tmp_path / "trials.jsonl")
    with pytest.raises(UserError, match=r"train\.steps"):
        check_header([first], header(with_overrides(config, {"train.steps": 4})), tmp_path / "trials.jsonl")
