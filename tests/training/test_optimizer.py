"""AdamW against torch's, and where its moments lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.config.training_sections import TrainConfig
from jaxtune.models import DecoderConfig, load_model
from jaxtune.training import Trainer
from jaxtune.training.masked_optimizer import MaskedOptimizer
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments.full import Full, FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule

CONFIG = DecoderConfig("llama", 11, 8, 12, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4)
# Layers of a stack under two rules and none, a stack of vectors under two, a matrix and a vector outside of stacks.
RULES = [
    FullRule(match="layers.0.{mlp.up,mlp_norm}", learning_rate_scale=0.5, weight_decay=0.3),
    FullRule(match="layers.{1..2}.mlp_norm", learning_rate_scale=0.0),
    FullRule(match="layers.2.mlp.up", weight_decay=0.0),
    LowRankRule(match="layers.{0,1}.attention.q", rank=2, learning_rate_scale=2.0),
    FullRule(match="{embed,final_norm}"),
]
PLAN = UpdatePlan(RULES).resolve(CONFIG)
VALUES = {
    "optimizer.beta1": jnp.float32(0.8),
    "optimizer.beta2": jnp.float32(0.95),
    "optimizer.epsilon": jnp.float32(1e-3),
    "optimizer.clip_norm": jnp.float32(1.5),
    "optimizer.weight_decay": jnp.float32(0.1),
}
RATES = (0.3, 0.05, 0.2, 0.0, 0.1, 0.02)
# In the arrays' own numbering: the two trained layers of mlp.up are 0 and 1 of its stack.
GROUPS = {
    ("full", "layers.mlp.up.kernel"): {0: (0.5, 0.3), 1: (1.0, 0.0)},
    ("full", "layers.mlp_norm.scale"): {0: (0.5, 0.3), 1: (0.0, 0.1), 2: (0.0, 0.1)},
    ("low_rank", "layers.attention.q", "a"): {0: (2.0, 0.1), 1: (2.0, 0.1)},
    ("low_rank", "layers.attention.q", "b"): {0: (2.0, 0.1), 1: (2.0, 0.1)},
    ("full", "embed.table"): {None: (1.0, 0.1)},
    ("full", "final_norm.scale"): {None: (1.0, 0.1)},
}


def started(generator):
    params = {part.path: jnp.zeros(part.shape, jnp.float32) for part in PLAN.parts if isinstance(part, Full)}
    shapes = jax.eval_shape(lambda: PLAN.init(jax.random.key(0), params))
    return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(np.float32), shapes)


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize("kernels", ["auto", "interpret"])
def test_several_steps_equal_those_of_torch(kernels):
    torch = pytest.importorskip("torch")
    generator = np.random.default_rng(0)
    start = started(generator)
    theirs, groups = {}, []
    for path, layers in GROUPS.items():
        for layer, (scale, decay) in layers.items():
            values = at(start, path) if layer is None else at(start, path)[layer]
            theirs[path, layer] = torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))
            groups.append({"params": [theirs[path, layer]], "weight_decay": decay, "scale": scale})
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-3)

    adamw = MaskedOptimizer(PLAN, kernels)
    ours = jax.tree.map(jnp.asarray, start)
    moments = adamw.init(ours)
    update = jax.jit(adamw.apply)
    norms = []
    for number, rate in enumerate(RATES):
        # Every other gradient is small enough not to be clipped.
        size = 0.02 if number % 2 else 2.0
        gradients = jax.tree.map(lambda a, size=size: (size * generator.standard_normal(a.shape)).astype("f4"), start)
        # The third layer's low-rank term has no rule: nothing depends on it, so its gradient is zero.
        for part in ("a", "b"):
            at(gradients, ("low_rank", "layers.attention.q", part))[2] = 0.0
        for (path, layer), value in theirs.items():
            values = at(gradients, path) if layer is None else at(gradients, path)[layer]
            value.grad = torch.tensor(values, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        expected_norm = float(torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.5))
        optimizer.step()
        ours, moments, norm = update(jax.tree.map(jnp.asarray, gradients), moments, ours, jnp.float32(rate), VALUES)
        assert float(norm) == pytest.approx(expected_norm, rel=1e-6)
        norms.append(expected_norm)
        for (path, layer), value in theirs.items():
            found = at(ours, path) if layer is None else at(ours, path)[layer]
            np.testing.assert_allclose(found, value.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=f"{path} {layer}")
    assert min(norms) < 1.5 < max(norms)
    # Where the factor is 0, or no rule is, nothing has moved; all else has.
    still = ("full", "layers.mlp_norm.scale"), ("low_rank", "layers.attention.q", "a")
    np.testing.assert_array_equal(at(ours, still[0])[1:], at(start, still[0])[1:])
    np.testing.assert_array_equal(at(ours, still[1])[2], at(start, still[1])[2])
    assert not np.isclose(at(ours, still[1])[:2], at(start, still[1])[:2]).any()


def test_moments_are_those_of_trained_layers_alone():
    trainable = jax.tree.map(jnp.asarray, started(np.random.default_rng(0)))
    moments = MaskedOptimizer(PLAN).init(trainable)
    stack = at(moments, ("low_rank", "layers.attention.q", "a"))
    assert [each.shape for each in stack[3].moments] == [(2, 8, 2), (2, 8, 2)]
    held = sum(leaf.size for leaf in jax.tree.leaves(moments) if leaf.dtype == jnp.float32)
    assert held == 2 * sum(
        at(trainable, path).size if layer is None else at(trainable, path)[layer].size
        for path, layers in GROUPS.items()
        for layer in layers
    )


def test_no_gradient_is_no_step_and_no_nan():
    plan = UpdatePlan([FullRule(match="final_norm", weight_decay=0.0)]).resolve(CONFIG)
    adamw = MaskedOptimizer(plan)
    trainable = {"low_rank": {}, "full": {"final_norm.scale": jnp.arange(8.0)}}
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    updated, _, norm = adamw.apply(zeros, adamw.init(trainable), trainable, jnp.float32(1.0), VALUES)
    assert norm == 0
    np.testing.assert_array_equal(updated["full"]["final_norm.scale"], np.arange(8.0))


def of_all_rules(states):
    """The moments of one array in one list."""
    return [moment for state in states.values() for moment in state.moments]


def test_moments_are_float32_and_cut_like_their_parameters(tiny_model, mesh):
    model = load_model(tiny_model, mesh, dtype="bfloat16")
    plan = UpdatePlan([FullRule(match="layers.*.mlp.up"), LowRankRule(match="layers.*.attention.q", rank=4)])
    trainer = Trainer(model, plan, TrainConfig(steps=2, batch_size=4, sequence_length=8))
    state = trainer.init()
    leaves, structure = jax.tree.flatten(state.trainable)
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
    for leaf, states in zip(leaves, structure.flatten_up_to(state.moments), strict=True):
        moments = of_all_rules(states)
        assert len(moments) == 2
        for moment in moments:
            assert (moment.shape, moment.dtype, moment.sharding) == (leaf.shape, jnp.float32, leaf.sharding)
    # A kernel of 2 x 32 x 48 over fsdp 2 and tensor 2: a quarter of it on each device, of the moments as well.
    second, _ = of_all_rules(state.moments["full"]["layers.mlp.up.kernel"])
    assert {shard.data.shape for shard in second.addressable_shards} == {(2, 16, 24)}


def test_rules_of_some_layers_are_traced_in_64_bit_mode():
    """For every platform: what is traced there must not take the width of Python's numbers."""
    trainable = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, started(np.random.default_rng(0))))
    adamw = MaskedOptimizer(PLAN)
    with jax.enable_x64(True):
        moments = jax.eval_shape(adamw.init, trainable)
        after, same, norm = jax.eval_shape(adamw.apply, trainable, moments, trainable, jnp.float32(0.1), VALUES)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (after, same)) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), (trainable, moments)
    )
    assert norm.dtype == jnp.float32
