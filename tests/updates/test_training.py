"""Gradients against PEFT's, and that everything which should move does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtune_kernels import hash_words

from jaxtune.models.decoder import merge, split
from jaxtune.models.loading import load_model
from jaxtune.updates import UpdatePlan, save_adapter
from jaxtune.updates.treatments.dora import DoraRule
from jaxtune.updates.treatments.full import FullRule
from jaxtune.updates.treatments.low_rank import LowRankRule


def loss_function(model, plan, tokens, values, fixed=None):
    """Mean cross entropy of the next token as a function of what is trained."""
    static, params = split(model)
    rows = hash_words(jnp.arange(tokens.size, dtype=jnp.uint32)).reshape(tokens.shape)

    def loss(trainable, dropout_seed=None):
        merged, adapters = plan.apply(params, trainable, values, dropout_seed, fixed)
        logits = merge(static, merged)(tokens, adapters=adapters, rows=None if dropout_seed is None else rows)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return loss


@pytest.mark.parametrize("kind", [LowRankRule, DoraRule])
def test_gradients_equal_those_of_peft(checkpoint, random_trainable, tokens, tmp_path, kind):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    import transformers

    directory = checkpoint("llama")
    model = load_model(directory, dtype="float32")
    rules = [
        kind(match="layers.{0,1}.attention", rank=4, alpha=8.0),
        kind(match="layers.*.mlp", rank=3, alpha=9.0),
        kind(match="layers.2.attention.{q,v}", rank=2, alpha=3.0),
    ]
    plan = UpdatePlan(rules).resolve(model, {"update.1.rank": 8})
    begun, fixed = plan.start(jax.random.key(0), split(model)[1], {})
    # Away from the start, and the sizes of columns away from zero.
    trainable = jax.tree.map(jnp.add, begun, random_trainable(begun, scale=0.1))
    computed = jax.jit(jax.grad(loss_function(model, plan, tokens, {}, fixed)))(trainable)

    # The gradients, written as an adapter, have the names and the orientation that PEFT's have.
    save_adapter(tmp_path / "weights", plan, trainable, {}, model, "base")
    save_adapter(tmp_path / "gradients", plan, computed, {}, model, "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "weights", is_trainable=True).eval()
    ids = torch.from_numpy(tokens).long()
    theirs(ids, labels=ids).loss.backward()

    from safetensors.numpy import load_file

    gradients = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    errors = {}
    for name, weight in theirs.named_parameters():
        if weight.grad is None:
            continue
        expected = weight.grad.numpy()
        ours = gradients[name.replace("vector.default.weight", "vector").replace(".default", "")]
        errors[name] = float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
    print(f"largest relative error of a gradient: {max(errors.values()):.1e}")
    assert max(errors.values()) < 1e-4, errors
    assert len(errors) == len(gradients) == (2 if kind is LowRankRule else 3) * (2 * 4 + 3 * 3 + 2)


@pytest.mark.parametrize("dropout", [False, True])
def test_every_trainable_tensor_moves_and_nothing_else(checkpoint, tokens, dropout):
    model = load_model(checkpoint("qwen3"), dtype="float32")
    rules = [
        LowRankRule(match="layers.{0,2}.attention", rank=3, dropout=0.3),
        LowRankRule(match="layers.*.mlp.down", rank=5),
        FullRule(match="layers.{0,1}.mlp_norm"),
        FullRule(match="layers.*.mlp.up"),
        FullRule(match="embed"),
    ]
    values = {"update.0.rank": jnp.float32(2), "optimizer.weight_decay": jnp.float32(0.0)}
    plan = UpdatePlan(rules).resolve(model)
    _, params = split(model)
    start = jax.jit(plan.init)(jax.random.key(0), params)
    loss = loss_function(model, plan, jnp.asarray(tokens), values)
    optimizer = optax.adamw(1e-3, weight_decay=0.0)

    @jax.jit
    def step(carry, seed):
        trainable, state = carry
        value, gradients = jax.value_and_grad(loss)(trainable, seed if dropout else None)
        updates, state = optimizer.update(gradients, state, trainable)
        return (optax.apply_updates(trainable, updates), state), value

    seeds = jnp.arange(20, dtype=jnp.uint32)
    (end, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), seeds)
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda before, after: np.asarray(before != after), start, end)
    attention, down = moved["low_rank"]["layers.attention.q"], moved["low_rank"]["layers.mlp.down"]
    for part, rank_axis in (("a", -1), ("b", -2)):
        active = np.moveaxis(attention[part], rank_axis, 0)
        assert active[:2, [0, 2]].mean() > 0.99  # the active columns, in the layers of the rule
        assert not active[2:].any()
        assert not active[:, 1].any()
        assert down[part].mean() > 0.99
    assert np.asarray(moved["full"]["layers.mlp_norm.scale"]).shape == (2, 32)
    for path in ("layers.mlp_norm.scale", "layers.mlp.up.kernel"):
        assert moved["full"][path].mean() > 0.99
    assert moved["full"]["embed.table"].any(axis=-1)[np.unique(tokens[:, :-1])].all()


def test_dropout_does_not_depend_on_the_order_of_rows(checkpoint, random_trainable, tokens):
    model = load_model(checkpoint("llama"), dtype="float32")
    plan = UpdatePlan([LowRankRule(match="layers.*", rank=3, dropout=0.4)]).resolve(model)
    static, params = split(model)
    trainable = random_trainable(jax.eval_shape(plan.init, jax.random.key(0), params))

    @jax.jit
    def logits(tokens, rows, seed):
        _, adapters = plan.apply(params, trainable, {}, seed)
        return merge(static, params)(tokens, adapters=adapters, rows=rows)

    rows = hash_words(jnp.arange(2, dtype=jnp.uint32)[:, None], jnp.arange(tokens.shape[1], dtype=jnp.uint32))
    first = logits(tokens, rows, jnp.uint32(1))
    np.testing.assert_allclose(logits(tokens[::-1], rows[::-1], jnp.uint32(1))[::-1], first, atol=1e-5)
    assert np.abs(logits(tokens, rows, jnp.uint32(2)) - first).max() > 0.05
    assert np.abs(logits(tokens, rows[::-1], jnp.uint32(1)) - first).max() > 0.05
