"""The ``optimizer`` section is one of several, found by its name; what it was before there was a choice it still is."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from jaxtune.config import Config, dotted, dump_config, load_config, program_name, with_overrides
from jaxtune.config.hyperparameters import hyperparameters
from jaxtune.config.optimizer_section import OPTIMIZERS, OptimizerSection
from jaxtune.config.packaged import copy_config
from jaxtune.config.section import Traced
from jaxtune.errors import UserError
from jaxtune.search.checks import check_space
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.training.optimizers.lion import LionConfig


class SignConfig(OptimizerSection):
    """What another package may bring: the sign of the gradient."""

    share: Annotated[float, Field(gt=0), Traced()] = Field(default=0.5, description="Share of the step.")


HERE = f"{__name__}:SignConfig"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"

    def write(optimizer="", further=""):
        text = "model: {path: m}\ndata: {train: a.jsonl, validation: b.jsonl, completion: '{a}'}\ntrain: {steps: 8}\n"
        path.write_text(f"{text}{optimizer}\n{further}\n")
        return path

    return write


def test_a_file_without_a_kind_is_adamw_s_and_its_program_has_the_name_that_it_had(file):
    config = load_config(file("optimizer: {learning_rate: 1.0e-3, beta2: 0.95}"))
    assert config.optimizer == OptimizerConfig(learning_rate=1e-3, beta2=0.95)
    assert program_name(load_config(file())) == "ba625f396215"
    assert program_name(load_config(file("optimizer: {kind: adamw}"))) == "ba625f396215"
    assert program_name(load_config(file("optimizer: {kind: lion}"))) != "ba625f396215"


@pytest.mark.parametrize("kind", [*OPTIMIZERS.builtin, HERE])
def test_each_is_read_written_and_compiled_once_for_all_of_its_numbers(file, kind):
    name = ", name: nadamw, numbers: {b1: 0.8}" if kind == "optax" else ""
    config = load_config(file(f"optimizer: {{kind: '{kind}'{name}}}"))
    assert config.optimizer.kind == kind
    assert Config.model_validate(config.model_dump()) == config
    path = file()
    path.write_text(dump_config(config))
    assert load_config(path).optimizer == config.optimizer
    numbers = hyperparameters(config.optimizer, "optimizer.")
    assert {"optimizer.learning_rate", "optimizer.weight_decay"} < numbers.keys()
    assert numbers.keys() <= dotted(config).keys()
    changed = {key: 200 if key.endswith("period") else 0.5 * value + 0.01 for key, value in numbers.items()}
    assert program_name(with_overrides(config, changed)) == program_name(config)


def test_another_kind_has_its_own_defaults(file):
    """Also in place of a configuration that a run has written out whole."""
    path = file("optimizer: {learning_rate: 3.0e-4}")
    path.write_text(dump_config(load_config(path)))
    for config in (
        load_config(path, ["optimizer.kind=lion"]),
        with_overrides(load_config(path), {"optimizer.kind": "lion"}),
    ):
        assert config.optimizer == LionConfig(learning_rate=3e-4)
    kept = {"optimizer.beta2": 0.999, "optimizer.kind": "lion"}
    assert with_overrides(load_config(path), kept).optimizer == LionConfig(learning_rate=3e-4, beta2=0.999)
    assert load_config(path, [f"{key}={value}" for key, value in kept.items()]).optimizer == LionConfig(
        learning_rate=3e-4, beta2=0.999
    )
    space = (
        "search: {space: {optimizer.kind: {choice: [adamw, lion, sgd]}, optimizer.learning_rate: {uniform: [0.1, 1]}}}"
    )
    check_space(load_config(file(further=space)))
    with pytest.raises(UserError, match=r"search\.space\.optimizer\.kind: 'lion' has no key 'epsilon', which"):
        check_space(load_config(file("optimizer: {epsilon: 1.0e-6}", space)))


@pytest.mark.parametrize(
    ("optimizer", "parts"),
    [
        ("{kind: lionn}", ["run.yaml:4", "optimizer.kind", "did you mean 'lion'?"]),
        ("{kind: 3}", ["optimizer.kind", "string"]),
        ("{kind: sgd, beta1: 0.5}", ["run.yaml:4: optimizer.beta1", "sgd has no such key", "adamw"]),
        ("{momentun: 0.5}", ["optimizer.momentun", "unknown key"]),
        ("{kind: sgd, momentun: 0.5}", ["optimizer.momentun", "did you mean 'momentum'?"]),
        ("{kind: sgd, momentum: 2}", ["optimizer.momentum", "less than 1"]),
        ("{kind: galore, rank: 0}", ["optimizer.rank", "greater than 0"]),
        ("{kind: optax}", ["optimizer.name", "required"]),
        ("{kind: optax, name: lamb, numbers: {b1: much}}", ["optimizer.numbers.b1", "number"]),
        ("{lr: 0.5}", ["optimizer.lr", "optimizer.learning_rate"]),
        ("lion", ["optimizer: expected keys such as kind"]),
        ("{kind: 'no.such.module:Thing'}", ["optimizer.kind", "cannot be imported", "no"]),
        ("{kind: 'json:loads'}", ["optimizer.kind", "is no OptimizerSection"]),
    ],
)
def test_what_cannot_be_is_told_with_the_nearest(file, optimizer, parts):
    with pytest.raises(UserError) as raised:
        load_config(file(f"optimizer: {optimizer}"))
    assert "\n" not in str(raised.value)
    for part in parts:
        assert part in str(raised.value)


def test_an_installed_package_brings_one_by_its_entry_point(file, monkeypatch):
    entry = importlib.metadata.EntryPoint("sign", HERE, "jaxtune.optimizers")
    found = importlib.metadata.EntryPoints([entry])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **asked: found.select(**asked))
    config = load_config(file("optimizer: {kind: sign, share: 0.25}"))
    assert config.optimizer == SignConfig(kind="sign", share=0.25)
    assert "sign" in OPTIMIZERS.names()
    with pytest.raises(ValidationError, match="OptimizerConfig is the section of adamw"):
        OptimizerConfig(kind="lion")
    with pytest.raises(UserError, match="did you mean 'sign'"):
        load_config(file("optimizer: {kind: sing}"))


def test_the_command_of_the_page_names_another(tmp_path):
    copy_config("quickstart", tmp_path / "quickstart.yaml")
    config = load_config(tmp_path / "quickstart.yaml", ["optimizer.kind=lion", "optimizer.learning_rate=3e-4"])
    assert config.optimizer.kind == "lion"
    assert config.optimizer.learning_rate == 3e-4
