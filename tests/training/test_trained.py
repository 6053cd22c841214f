"""What a run left, put back onto the model."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jaxtune.config import load_config, with_overrides
from jaxtune.errors import UserError
from jaxtune.telemetry.writers import read_metrics
from jaxtune.training.opened_config import OpenedConfig
from jaxtune.training.run import train
from jaxtune.training.trained import trained
from tests.tiny_task import configuration

SHORT = {
    "train.steps": 6,
    "train.evaluate_every": 1,
    "data.test": None,
    "optimizer.learning_rate": 0.05,
    "optimizer.warmup": 0.0,
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tiny_model):
    """A finished run, its configuration opened, and its summary; what it learns makes the validation loss worse."""
    directory = tmp_path_factory.mktemp("trained")
    for split, answer in (("train", "w1 w2"), ("validation", "w30 w31")):
        lines = [{"question": f"w{index} w5 w6 w7 w8", "answer": answer} for index in range(10, 18)]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "run.yaml").write_text(configuration(directory / "run", tiny_model, directory))
    config = with_overrides(load_config(directory / "run.yaml"), SHORT)
    summary = train(config)
    return OpenedConfig(config), summary


def evaluations(opened):
    lines = read_metrics(f"{opened.config.directory}/metrics.jsonl")
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def test_the_best_checkpoint_is_taken_and_exported(opened):
    opened, summary = opened
    losses = evaluations(opened)
    best = min(losses, key=lambda step: losses[step])
    assert best < 6
    left = trained(opened)
    assert left.origin.endswith(f"at step {best}")
    assert int(left.state.step) == best
    found = left.trainer.evaluate(left.state, opened.validation_batches).loss
    assert found == pytest.approx(losses[best], rel=1e-6)
    assert found != pytest.approx(losses[6], rel=1e-3)
    assert summary["adapter"]["step"] == best
    # The summary's own numbers are those of the end.
    assert summary["metrics"]["validation_loss"] == losses[6]


def test_the_adapter_is_the_same_state(opened):
    opened, summary = opened
    whole, adapter = trained(opened), trained(opened, adapter=summary["adapter"]["path"])
    assert adapter.origin == f"adapter {summary['adapter']['path']}"
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7),
        adapter.state.trainable,
        whole.state.trainable,
    )
    losses = [each.trainer.evaluate(each.state, opened.validation_batches).loss for each in (whole, adapter)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_untuned_model_is_the_base(opened):
    opened, _ = opened
    left = trained(opened, untuned=True)
    params, adapters = left.apply()
    assert all(not np.any(adapter.b) for adapter in adapters.values())
    for path, value in left.trainer.params.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)


def test_no_run_and_another_run_are_told(opened, tmp_path):
    opened, _ = opened
    nowhere = OpenedConfig(with_overrides(opened.config, {"run_dir": str(tmp_path / "none")}), parts=())
    with pytest.raises(UserError, match=r"no checkpoint; run jaxtune train first"):
        trained(nowhere)
    (tmp_path / "none" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint was finished"):
        trained(nowhere)
    wider = OpenedConfig(with_overrides(opened.config, {"update.0.rank": 6}), parts=())
    with pytest.raises(UserError, match=r"another configuration") as error:
        trained(wider)
    assert "'layers.attention.q']['a'] is float32[2, 32, 4], this configuration makes float32[2, 32, 6]" in str(
        error.value
    )


def test_a_finished_run_is_not_trained_again(opened, monkeypatch):
    opened, summary = opened
    monkeypatch.setattr(OpenedConfig, "batches", lambda *_: pytest.fail("it trained"))
    assert train(opened.config) == summary
