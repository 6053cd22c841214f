"""The traced numbers follow from the schema's annotations, and from nothing else."""

from __future__ import annotations

import typing

import pytest
from pydantic import BaseModel

from jaxtune.config import capacities, dotted, hyperparameters, load_config, program_key, with_overrides
from jaxtune.config import schema as schema_module
from jaxtune.config.roles import mark_of
from jaxtune.config.schema import Config
from jaxtune.config.section import Traced
from jaxtune.config.training_sections import TrainConfig
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.updates.treatments.frozen import FrozenRule
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule

YAML = """\
model: {path: somewhere}
data: {train: rows.jsonl, validation: {path: more.jsonl, limit: 4}, completion: "{text}"}
train: {steps: 10}
update:
  - {match: "layers.0.**", method: frozen}
  - {match: "layers.*.attention", method: low_rank, rank: 8, weight_decay: 0.5}
  - {match: "layers.*.mlp", method: low_rank, rank: 4}
  - {match: "**", method: full}
search:
  space:
    optimizer.learning_rate: {log_uniform: [1e-5, 1e-2]}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return load_config(path)


def sections():
    return [
        kind
        for kind in vars(schema_module).values()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.__module__ == schema_module.__name__
    ]


def marked(kind):
    """Names of the fields whose annotation mentions the mark, read from the type hints by another way."""

    def mentions(hint):
        if typing.get_origin(hint) is typing.Annotated:
            inner, *rest = typing.get_args(hint)
            return any(isinstance(each, Traced) for each in rest) or mentions(inner)
        return any(mentions(each) for each in typing.get_args(hint))

    return {name for name, hint in typing.get_type_hints(kind, include_extras=True).items() if mentions(hint)}


@pytest.mark.parametrize("kind", sections(), ids=lambda kind: kind.__name__)
def test_a_field_is_traced_exactly_where_its_annotation_says_so(kind):
    assert {name for name, field in kind.model_fields.items() if mark_of(field, Traced) is not None} == marked(kind)


def test_the_derived_list_is_that_of_the_annotations(config):
    rules = {
        0: FrozenRule,
        1: LowRankRule,
        2: LowRankRule,
        3: FullRule,
    }
    expected = {f"train.{name}" for name in marked(TrainConfig)} | {
        f"optimizer.{name}" for name in marked(OptimizerConfig)
    }
    expected |= {f"update.{index}.{name}" for index, kind in rules.items() for name in marked(kind)}
    # Optional and unset: no argument of the compiled step.
    expected -= {f"update.{index}.weight_decay" for index in (0, 2, 3)}
    expected -= {"train.neftune_alpha", *(f"update.{index}.layer_decay" for index in rules)}
    values = hyperparameters(config)
    assert values.keys() == expected
    assert {"optimizer.learning_rate", "optimizer.warmup", "update.1.rank", "update.1.alpha"} <= expected
    assert all(type(value) is float for value in values.values())
    assert (values["update.1.rank"], values["update.1.weight_decay"], values["train.steps"]) == (8.0, 0.5, 10.0)


def test_a_section_and_a_list_of_rules_have_the_same_keys_as_the_whole(config):
    parts = hyperparameters(config.train, "train.") | hyperparameters(config.optimizer, "optimizer.")
    assert parts | hyperparameters(list(config.update), "update.") == hyperparameters(config)


def test_only_ranks_bound_a_shape(config):
    assert capacities(config) == {"update.1.rank": 8, "update.2.rank": 4}
    assert capacities(list(config.update), "update.") == capacities(config)


def test_dotted_lists_every_leaf_once(config):
    leaves = dotted(config)
    assert leaves["data.validation.limit"] == 4
    assert leaves["update.3.method"] == "full"
    assert leaves["run_dir"] is None
    assert not any(isinstance(value, BaseModel) for value in leaves.values())
    # The keys are those that an override takes: setting each to what it is changes nothing.
    settable = {k: v for k, v in leaves.items() if not k.startswith("search.space") and v is not None}
    assert with_overrides(config, settable) == config


def other(key, value):
    """Another valid value of a traced number."""
    name = key.rpartition(".")[2]
    return int(value) + 1 if name in ("steps", "rank") else 0.5 * value + 0.01


def test_no_traced_number_makes_another_program(config):
    for key, value in hyperparameters(config).items():
        changed = with_overrides(config, {key: other(key, value)})
        assert changed != config, key
        assert program_key(changed) == program_key(config), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.path", "elsewhere"),
        ("model.remat", "full"),
        ("model.dtype", "bfloat16"),
        ("data.packing", False),
        ("train.batch_size", 32),
        ("train.accumulate", 2),
        ("train.sequence_length", 64),
        ("optimizer.schedule", "constant"),
        ("update.1.match", "layers.*.attention.q"),
        ("update.1.method", "full"),
        ("update.1.use_rslora", True),
        ("update.2.weight_decay", 0.1),
        ("parallel.tensor", 2),
    ],
)
def test_what_is_compiled_in_makes_another_program(config, key, value):
    if key == "update.1.method":
        rules = [rule.model_dump() for rule in config.update]
        rules[1] = {"match": rules[1]["match"], "method": "full", "weight_decay": 0.5}
        changed = Config.model_validate({**config.model_dump(), "update": rules})
    else:
        changed = with_overrides(config, {key: value})
    assert program_key(changed) != program_key(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "other"),
        ("run_dir", "runs/x"),
        ("train.seed", 9),
        ("train.log_every", 3),
        ("train.evaluate_every", 3),
        ("train.checkpoint_every", 3),
        ("train.checkpoint_minutes", None),
        ("train.keep.latest", 3),
        ("train.patience", 3),
        ("telemetry.tensorboard", False),
        ("evaluation.batch_size", 7),
    ],
)
def test_what_only_names_reports_or_seeds_a_run_does_not(config, key, value):
    assert program_key(with_overrides(config, {"train.evaluate_every": 2, key: value})) == program_key(config)
