"""EVA: components as NumPy finds them, ranks that move to where they explain most, and a start that is made once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config.training_sections import TrainConfig
from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, load_model, random_model, save_model
from jaxtune.models.decoder import split
from jaxtune.training import Trainer
from jaxtune.training.batches import Ahead, as_batches
from jaxtune.training.checkpoints import Checkpoints
from jaxtune.training.optimizers.adamw import OptimizerConfig
from jaxtune.updates import UpdatePlan, merge_adapters
from jaxtune.updates.peft.load import read_adapter
from jaxtune.updates.treatments.eva import EvaRule, explained, more_directions, redistributed

CONFIG = DecoderConfig(
    "qwen2", 48, 16, 24, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=8, qkv_bias=True, initializer_range=0.3
)  # fmt: skip
RULES = [EvaRule(match="layers.*.attention.{q,v}", rank=2, rho=2.0, batches=2), EvaRule(match="**.down", rank=3)]


def batch(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 48, (4, 7)).astype(np.int32)
    weights = (generator.random((4, 6)) < 0.5).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(random_model(CONFIG, jax.random.key(0)), directory)
    return directory


@pytest.fixture(scope="module")
def trainer(base) -> Trainer:
    train = TrainConfig(steps=4, batch_size=4, sequence_length=6)
    model = load_model(base, dtype="float32")
    return Trainer(model, UpdatePlan(RULES), train, OptimizerConfig(learning_rate=1e-2), capacity={"update.0.rank": 3})


def principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components and the shares of the variance that they explain."""
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    return vectors[:, ::-1].T, values[::-1] / values.sum()


def test_components_of_batches_are_those_of_all_at_once():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((60, 6)) * [5, 4, 3, 2, 1, 0.5] + 3
    found = None
    for part in (rows[:3], rows[3:3], rows[3:40], rows[40:]):
        found = more_directions(found, part, 6)
    assert found is not None
    components, shares = principal(rows)
    np.testing.assert_allclose(explained(found), shares, rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(found.components * components, axis=1)), 1.0, rtol=1e-9)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-9)
    # What is cut off along the way costs little where it is small.
    few = more_directions(more_directions(None, rows[:30], 3), rows[30:], 3)
    assert few is not None
    np.testing.assert_allclose(explained(few), shares[:3], rtol=0.05)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.floats(0, 1), min_size=6, max_size=6), min_size=1, max_size=5),
    st.integers(1, 3),
    st.sampled_from([1.0, 1.5, 2.0]),
)
def test_ranks_move_and_their_sum_stays(values, rank, rho):
    shares = [np.sort(np.array(each))[::-1] for each in values]
    ranks = redistributed(shares, rank, rho)
    assert sum(ranks) == rank * len(shares)
    assert max(ranks) <= round(rho * rank)
    if rho == 1.0:
        assert set(ranks) == {rank}
    # Nothing that was left out explains more than what was taken.
    taken = [share for each, own in zip(shares, ranks, strict=True) for share in each[:own]]
    left = [share for each, own in zip(shares, ranks, strict=True) for share in each[own : round(rho * rank)]]
    assert not left or max(left) <= min(taken)


def test_the_start_is_made_of_the_inputs_whose_losses_count(trainer, base):
    batches = [batch(0), batch(1)]
    state = trainer.informed(trainer.init(), batches)
    params = split(load_model(base, dtype="float32"))[1]
    # The first layer's inputs are embeddings behind a norm.
    rows = np.concatenate([params["embed.table"][one["tokens"][one["weights"] > 0]] for one in batches])
    rows = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + CONFIG.norm_eps)
    components, _ = principal(rows.astype(np.float64))
    a = np.asarray(state.trainable["eva"]["layers.attention.q"]["a"])
    assert a.shape == (3, 16, 6)
    # Six were kept of the first batch, so that the last ones are not quite what they are of both at once.
    np.testing.assert_allclose(np.abs(np.sum(a[0].T[:2] * components[:2], axis=1)), 1.0, atol=0.02)
    np.testing.assert_allclose(np.swapaxes(a, 1, 2) @ a, np.broadcast_to(np.eye(6), (3, 6, 6)), atol=1e-5)
    np.testing.assert_array_equal(a, state.trainable["eva"]["layers.attention.v"]["a"])
    assert not np.any(state.trainable["eva"]["layers.mlp.down"]["b"])
    ranks = {path: np.asarray(kept["ranks"]) for path, kept in state.fixed["eva"].items()}
    for rank in (1, 2, 3):
        assert ranks["layers.attention.q"][:, rank].sum() + ranks["layers.attention.v"][:, rank].sum() == 6 * rank
        assert ranks["layers.mlp.down"][:, rank].sum() == 3 * rank


def moved(leaf: Any) -> Any:
    return leaf + 0.2 * np.random.default_rng(1).standard_normal(leaf.shape).astype(np.float32)


def exported(trainer: Trainer, base: Path, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and what the merged model makes of them, of an adapter that is written."""
    state = trainer.informed(trainer.init(), [batch(0), batch(1)])
    trainable = jax.tree.map(moved, state.trainable)
    trainer.save_adapter(directory, dataclasses.replace(state, trainable=trainable), base=str(base))
    tokens, model = batch(2)["tokens"], load_model(base, dtype="float32")
    merged = merge_adapters(model, trainer.plan, trainable, trainer.hyperparameters, state.fixed)
    return tokens, np.asarray(merged(tokens))


def test_it_is_written_as_lora_with_ranks_and_alphas_of_its_own(trainer, base, tmp_path):
    tokens, ours = exported(trainer, base, tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["rank_pattern"]
    model = load_model(base, dtype="float32")
    read = read_adapter(tmp_path, model)
    again = merge_adapters(model, read.plan.resolve(model), read.trainable, read.values)
    np.testing.assert_allclose(again(tokens), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_peft_reads_it(trainer, base, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    tokens, ours = exported(trainer, base, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        out = adapted(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(out, ours, rtol=2e-3, atol=2e-3)


def test_a_run_learns_of_the_data_once(trainer, tmp_path, monkeypatch):
    data, counted = [batch(seed) for seed in range(3)], []
    whole = trainer.informed

    def informed(state, batches):
        counted.append([int(one["tokens"][0, 0]) for one in batches])
        return whole(state, batches)

    monkeypatch.setattr(trainer, "informed", informed)
    # Of eight batches that the rule asks for it looks at those that it trains on.
    straight = trainer.fit(data, listener=None)
    assert counted == [[int(data[index % 3]["tokens"][0, 0]) for index in range(4)]]
    for until in (2, 4):
        checkpoints = Checkpoints(tmp_path)
        result = trainer.fit(data, until=until, checkpoints=checkpoints, listener=None)
    assert len(counted) == 2
    jax.tree.map(np.testing.assert_array_equal, result.state, straight.state)
    # By hand: the first step is one of the first batch.
    state, _ = trainer.step(whole(trainer.init(), [data[index % 3] for index in range(4)]), data[0])
    for one in (data[1], data[2], data[0]):
        state, _ = trainer.step(state, one)
    jax.tree.map(np.testing.assert_array_equal, state, straight.state)


def test_batches_that_were_looked_at_are_still_taken():
    ahead = Ahead(as_batches([{"x": np.array([index])} for index in range(3)]))
    assert [int(one["x"][0]) for one in ahead.look(2)] == [0, 1]
    assert ahead.get_state() == {"taken": 0}
    assert [int(next(ahead)["x"][0]) for _ in range(4)] == [0, 1, 2, 0]
    assert ahead.get_state() == {"taken": 4}


def test_bad_input(trainer):
    with pytest.raises(UserError, match=r"method eva starts from .* and the batch holds chosen"):
        trainer.informed(trainer.init(), [{"chosen": np.zeros((4, 6), np.int32)}])
    with pytest.raises(UserError, match="method eva starts from the first batches, and no loss counts in them"):
        trainer.informed(trainer.init(), [{**batch(0), "weights": np.zeros((4, 6), np.float32)}])
    plan = UpdatePlan([EvaRule(match="**.q", rank=20)]).resolve(CONFIG)
    with pytest.raises(UserError, match=r"update\.0\.rank: 20 is above the 16 inputs of layers\.attention\.q"):
        plan.check({})
