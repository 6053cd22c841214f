"""AdamW against torch's, and where its moments lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.schema import FullRule, LowRankRule, TrainConfig
from jaxtune.models import load_model
from jaxtune.training import Trainer
from jaxtune.training.optimizer import adamw_update, init_moments
from jaxtune.updates import UpdatePlan

VALUES = {
    "optimizer.beta1": jnp.float32(0.8),
    "optimizer.beta2": jnp.float32(0.95),
    "optimizer.epsilon": jnp.float32(1e-3),
    "optimizer.clip_norm": jnp.float32(1.5),
}
RATES = (0.3, 0.05, 0.2, 0.0, 0.1, 0.02)


def test_several_steps_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    shapes = {"stack": (3, 4, 2), "matrix": (5, 3), "vector": (7,)}
    start = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    # A stack has a factor and a decay for each layer; torch gets each layer as a parameter group of its own.
    scales = {"stack": np.array([1.0, 0.5, 0.0], np.float32)[:, None, None], "matrix": 2.0, "vector": 1.0}
    decays = {"stack": np.array([0.0, 0.1, 0.3], np.float32)[:, None, None], "matrix": 0.2, "vector": 0.0}
    theirs = {
        (name, layer): torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
        for name, array in start.items()
        for layer, values in (enumerate(array) if name == "stack" else [(None, array)])
    }

    def of(table, key):
        name, layer = key
        return float(table[name] if layer is None else table[name][layer, 0, 0])

    groups = [{"params": [value], "weight_decay": of(decays, key)} for key, value in theirs.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)

    ours = jax.tree.map(jnp.asarray, start)
    moments = init_moments(ours, VALUES)
    update = jax.jit(adamw_update)
    as_arrays = {name: jnp.asarray(value, jnp.float32) for name, value in scales.items()}
    decay_arrays = {name: jnp.asarray(value, jnp.float32) for name, value in decays.items()}
    norms = []
    for number, rate in enumerate(RATES):
        # Every other gradient is small enough not to be clipped.
        size = 0.05 if number % 2 else 2.0
        gradients = {n: (size * generator.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
        for key, value in theirs.items():
            name, layer = key
            value.grad = torch.tensor(gradients[name] if layer is None else gradients[name][layer], dtype=torch.float64)
        for group, key in zip(optimizer.param_groups, theirs, strict=True):
            group["lr"] = rate * of(scales, key)
        expected_norm = float(torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.5))
        optimizer.step()
        ours, moments, norm = update(
            jax.tree.map(jnp.asarray, gradients), moments, ours, jnp.float32(rate), VALUES, as_arrays, decay_arrays
        )
        assert float(norm) == pytest.approx(expected_norm, rel=1e-6)
        norms.append(expected_norm)
        for key, value in theirs.items():
            name, layer = key
            found = ours[name] if layer is None else ours[name][layer]
            np.testing.assert_allclose(found, value.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=f"{key} {number}")
    assert min(norms) < 1.5 < max(norms)
    # The layer whose factor is 0 has stood still; all others have moved.
    np.testing.assert_array_equal(ours["stack"][2], start["stack"][2])
    assert not np.isclose(ours["stack"][:2], start["stack"][:2]).any()


def test_no_gradient_is_no_step_and_no_nan():
    trainable = {"w": jnp.arange(3.0)}
    zeros = {"w": jnp.zeros(3)}
    none = {"w": jnp.float32(0.0)}
    updated, _, norm = adamw_update(
        zeros, init_moments(trainable, VALUES), trainable, jnp.float32(1.0), VALUES, {"w": jnp.float32(1.0)}, none
    )
    assert norm == 0
    np.testing.assert_array_equal(updated["w"], trainable["w"])


def test_moments_are_float32_and_cut_like_their_parameters(tiny_model, mesh):
    model = load_model(tiny_model, mesh, dtype="bfloat16")
    plan = UpdatePlan([FullRule(match="layers.*.mlp.up"), LowRankRule(match="layers.*.attention.q", rank=4)])
    trainer = Trainer(model, plan, TrainConfig(steps=2, batch_size=4, sequence_length=8))
    state = trainer.init()
    leaves = jax.tree.leaves(state.trainable)
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
    for moment in (state.moments.mu, state.moments.nu):
        assert jax.tree.structure(moment) == jax.tree.structure(state.trainable)
        for one, other in zip(jax.tree.leaves(moment), leaves, strict=True):
            assert (one.shape, one.dtype) == (other.shape, jnp.float32)
            assert one.sharding == other.sharding
    assert state.moments.count.sharding.is_fully_replicated
    # A kernel of 2 x 32 x 48 over fsdp 2 and tensor 2: a quarter of it on each device, of the moments as well.
    shards = state.moments.nu["full"]["layers.mlp.up.kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 16, 24)}
