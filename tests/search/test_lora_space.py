"""``search.space: lora``: explicit keys with priors, for the rules and the model at hand; what began with it stays."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from jaxtune.config import load_config
from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig
from jaxtune.search.checks import check_space
from jaxtune.search.lora_space import likely_rate, lora_space, with_space
from jaxtune.search.space import Space
from jaxtune.training.run_directory import RunDirectory
from jaxtune.updates.treatments.frozen import FrozenRule
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule

HEAD = """\
model: {path: "jaxtune:nano"}
data: {train: rows.jsonl, validation: rows.jsonl, prompt: p, completion: c}
train: {steps: 10}
"""
USUAL = ["optimizer.learning_rate", "optimizer.warmup", "optimizer.weight_decay"]
MODEL = DecoderConfig(
    family="llama", vocab_size=8, hidden_size=2000, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=2,
)  # fmt: skip


def of_rule(index: int) -> list[str]:
    return [f"update.{index}.{name}" for name in ("rank", "alpha", "dropout")]


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"{HEAD}run_dir: {tmp_path / 'run'}\nsearch: {{trials: 8, space: lora}}\n")
    return path


@pytest.mark.parametrize(
    ("family", "width", "rate"),
    [
        ("llama", 2000, 5e-4), ("qwen3", 2000, 5e-4), ("gemma2", 2000, 5e-4),
        ("llama", 4096, 2.9e-4), ("llama", 8192, 1.7e-4), ("qwen2", 8192, 4.5e-4), ("mistral", 4096, 3.7e-4),
        ("llama", 128, 4.3e-3), ("qwen3", 1024, 5.3e-4), ("qwen3", 128, 2.7e-3),
    ],
)  # fmt: skip
def test_the_rate_follows_the_width_as_published(family, width, rate):
    """Values of the published formula, by hand: 5e-4 (2000 / width)^p; and of its continuation below 1024."""
    assert likely_rate(dataclasses.replace(MODEL, family=family, hidden_size=width)) == rate


def test_every_low_rank_rule_is_searched_and_no_other():
    rules = [
        FrozenRule(match="embed"), LowRankRule(match="a"), FullRule(match="b"), LowRankRule(match="c", use_rslora=True)
    ]  # fmt: skip
    space = lora_space(rules, MODEL)
    assert list(space) == [*USUAL, *of_rule(1), *of_rule(3)]
    assert (space["update.1.alpha"]["prior"], space["update.3.alpha"]["prior"]) == (32, 8)
    # An adapter that training starts from has settled ranks and alphas.
    assert list(lora_space(rules, MODEL, settled=True)) == [*USUAL, "update.1.dropout", "update.3.dropout"]
    with pytest.raises(UserError, match=r"update has none \(frozen, full\); add a rule with method: low_rank"):
        lora_space([rules[0], rules[2]], MODEL)


def test_it_becomes_explicit_keys_that_a_study_records(config_file, tmp_path):
    config = with_space(load_config(config_file))
    assert config.search is not None
    assert config.search.preset is None
    assert list(config.search.space) == [*USUAL, *of_rule(0)]
    check_space(config)
    assert all(dimension.prior is not None for dimension in Space(config.search.space).dimensions)
    assert with_space(config) == config
    RunDirectory(tmp_path / "run", study=True).claim(config)
    again = load_config(tmp_path / "run" / "config.yaml").search
    assert again == config.search
    # A configuration without a search is none of its business.
    assert with_space(config.model_copy(update={"search": None})).search is None


def test_keys_take_the_place_of_its_own_or_come_on_top(config_file, tmp_path):
    plain = with_space(load_config(config_file)).search
    assert plain is not None
    overrides = ["search.space.update.0.rank={integer: [2, 5]}", "search.space.optimizer.beta2={uniform: [0.9, 0.99]}"]
    over = with_space(load_config(config_file, overrides)).search
    own = "{update.0.rank: {integer: [2, 5]}, optimizer.beta2: {uniform: [0.9, 0.99]}}"
    (tmp_path / "two.yaml").write_text(f"{HEAD}search: {{trials: 8, preset: lora, space: {own}}}\n")
    both = with_space(load_config(tmp_path / "two.yaml")).search
    assert over is not None
    assert both is not None
    assert list(over.space) == [*plain.space, "optimizer.beta2"]
    assert over.space == both.space
    assert {key for key in plain.space if plain.space[key] != over.space[key]} == {"update.0.rank"}
    # A mapping takes the place of the word; the word, on the command line, that of a mapping.
    other = load_config(config_file, ["search.space={optimizer.warmup: {uniform: [0, 1]}}"])
    assert list(with_space(other).search.space) == ["optimizer.warmup"]  # pyright: ignore[reportOptionalMemberAccess]
    (tmp_path / "own.yaml").write_text(
        f"{HEAD}search: {{trials: 8, space: {{optimizer.beta1: {{uniform: [0, 0.9]}}}}}}\n"
    )
    word = with_space(load_config(tmp_path / "own.yaml", ["search.space=lora"])).search
    assert word is not None
    assert word.space == plain.space


def test_a_study_that_has_begun_keeps_its_space(config_file, tmp_path):
    began = {"optimizer.learning_rate": {"log_uniform": [1e-6, 1e-5], "prior": 2e-6}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trials.jsonl").write_text(json.dumps({"event": "study", "space": began}) + "\n")
    search = with_space(load_config(config_file)).search
    assert search is not None
    assert {key: dimension.model_dump(exclude_none=True) for key, dimension in search.space.items()} == {
        "optimizer.learning_rate": {"log_uniform": (1e-6, 1e-5), "prior": 2e-6}
    }


def test_another_word_is_answered_with_the_one_there_is(config_file):
    with pytest.raises(UserError, match=r"search\.space: 'lroa' is no space; did you mean 'lora'\?, or give a mapping"):
        load_config(config_file, ["search.space=lroa"])
