"""What each method is by its paper, beside what all keep to."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, random_model
from jaxtune.models.decoder import split
from jaxtune.models.linear import FrozenLayer
from jaxtune.updates import UpdatePlan
from jaxtune.updates.treatments import pissa
from jaxtune.updates.treatments.base import Matched
from jaxtune.updates.treatments.lora_fa import LoraFa, LoraFaRule
from jaxtune.updates.treatments.lora_plus import LoraPlusRule
from jaxtune.updates.treatments.miss import MissRule
from jaxtune.updates.treatments.oft import Oft, OftRule
from jaxtune.updates.treatments.olora import Olora, OloraRule
from jaxtune.updates.treatments.orthogonal import Orthogonal, OrthogonalRule
from jaxtune.updates.treatments.pissa import Pissa, PissaRule
from jaxtune.updates.treatments.rslora import RsLoraRule
from jaxtune.updates.treatments.s2ft import S2ft, S2ftRule
from jaxtune.updates.treatments.vera import Vera, VeraRule

KERNEL = Matched("layers.mlp.up.kernel", (2, 24, 40), ("layers", "embed", "mlp"), (0, -1))
W = np.random.default_rng(0).standard_normal((2, 24, 40)) / 5


def begun(treatment, rule, **values):
    """Its start, in float64: a0, b0 and the scale of the first layer."""
    (made,) = treatment.treat([KERNEL], {0: rule}, {"update.0.rank": 8})
    base = {KERNEL.path: jnp.asarray(W, jnp.float32)}
    arrays, fixed = made.init(jax.random.key(0), base, values)
    for name in "ab":
        np.testing.assert_array_equal(arrays[name], fixed[f"{name}0"])
        assert np.all(np.isfinite(arrays[name]))
    a, b = (np.asarray(fixed[name][0], np.float64) for name in ("a0", "b0"))
    return a, b, float(made.scale(values)[0])


@pytest.mark.parametrize("exact", [True, False])
def test_pissa_starts_as_the_largest_singular_part(exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(pissa, "_EXACT", 0)
    a, b, scale = begun(Pissa, PissaRule(match="**", rank=4, alpha=6.0), **{"update.0.rank": 3.0})
    assert scale == 2.0
    s = np.linalg.svd(W[0], compute_uv=False)
    for rank in (1, 3, 8):  # it nests: what a mask leaves is the largest part of that rank
        left = np.linalg.norm(W[0] - scale * a[:, :rank] @ b[:rank])
        best = np.sqrt(np.sum(s[rank:] ** 2))
        assert left == pytest.approx(best, rel=1e-5 if exact else 5e-3)
    for side in (np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)):
        np.testing.assert_allclose(side**2, s[:8] / scale, rtol=1e-4 if exact else 0.1)


def test_olora_starts_from_the_first_columns_of_a_qr_decomposition():
    a, b, _ = begun(Olora, OloraRule(match="**", rank=4, alpha=6.0))
    np.testing.assert_allclose(b @ b.T, np.eye(8), atol=1e-5)
    for rank in (1, 4, 8):  # what so many columns of Q hold of Wᵀ are its first columns, whole
        np.testing.assert_allclose((a[:, :rank] @ b[:rank])[:rank], W[0][:rank], atol=1e-5)


def test_the_gradient_of_lora_fa_is_that_of_lora_times_an_inverse():
    (made,) = LoraFa.treat([KERNEL], {0: LoraFaRule(match="**", rank=3, alpha=6.0)}, {"update.0.rank": 5})
    arrays, fixed = made.init(jax.random.key(0), {}, {})
    x = np.random.default_rng(1).standard_normal((7, 24))

    def loss(arrays):
        adapter = made.apply({}, arrays, fixed, {}, None).adapters["layers.mlp.up"]
        return jnp.sum(jnp.sin(x @ adapter.a[0] @ adapter.b[0] * adapter.scale[0] + 0.3))

    gradient = jax.grad(loss)(arrays)["b"]
    a = np.asarray(fixed["a"][0, :, :3], np.float64)
    plain = 2.0 * (x @ a).T @ np.full((7, 40), np.cos(0.3))
    np.testing.assert_allclose(gradient[0, :3], np.linalg.inv(a.T @ a) @ plain / 2.0**2, rtol=1e-3, atol=1e-4)
    assert not np.any(gradient[0, 3:])
    assert not np.any(gradient[1])


def test_scales_rates_and_sums():
    config = DecoderConfig("llama", 19, 16, 24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    model = random_model(config, jax.random.key(0))
    rules = [
        RsLoraRule(match="**.q", rank=4, alpha=6.0),
        LoraPlusRule(match="**.k", rank=4, ratio=5.0, learning_rate_scale=2.0),
        MissRule(match="**.v", rank=5),
    ]
    plan = UpdatePlan(rules).resolve(model)
    params = split(model)[1]
    trainable, fixed = plan.start(jax.random.key(0), params, {})
    adapters = plan.apply(params, trainable, {"update.2.rank": 3.0}, fixed=fixed)[1]
    np.testing.assert_allclose(adapters["layers.attention.q"].scale, 6.0 / 2.0)
    groups = plan.groups()["lora_plus"]["layers.attention.k"]
    assert [plan.rate_scale(groups[name], 1, {}) for name in "ab"] == [2.0, 10.0]
    assert plan.rate_scale(groups["b"], 1, {"update.1.ratio": 3.0}) == 6.0
    x = np.arange(16.0)
    pooled = [x[i::3].sum() for i in range(3)] + [0.0, 0.0]
    np.testing.assert_allclose(x @ np.asarray(adapters["layers.attention.v"].a[0]), pooled)


def test_vera_scales_a_term_that_all_modules_share():
    small = Matched("layers.attention.q.kernel", (2, 16, 12), ("layers", "embed", "heads"), (-1, 0))
    made = list(Vera.treat([KERNEL, small], {0: VeraRule(match="**", rank=50)}, {"update.0.rank": 60}))
    (up, up_fixed), (q, q_fixed) = (part.init(jax.random.key(0), {}, {}) for part in made)
    for name, part in (("a", np.s_[:16]), ("b", np.s_[:, :12])):
        np.testing.assert_array_equal(q_fixed[name], up_fixed[name][part])
    # Of the module that has most inputs, and of the ranks in use.
    bounds = np.abs(up_fixed["a"]).max(), np.abs(up_fixed["b"]).max()
    np.testing.assert_allclose(bounds, [(6 / 24) ** 0.5, 6**0.5], rtol=0.01)
    assert np.all(up["d"] == np.float32(0.1))
    assert not np.any(up["b"])
    generator = np.random.default_rng(1)
    d, b, w, bias, x = (generator.standard_normal(shape) for shape in [(60,), (12,), (16, 12), (12,), (7, 16)])
    arrays = {"d": jnp.stack([q["d"][0], jnp.asarray(d, jnp.float32)]), "b": jnp.stack([q["b"][0], jnp.asarray(b)])}
    adapter = made[1].apply({}, arrays, q_fixed, {"update.0.rank": 40.0}, None).adapters["layers.attention.q"]
    ours = layer_of(adapter, 1, x, w, bias)
    a, c = (np.asarray(q_fixed[name], np.float64) for name in "ab")
    term = b * ((d[:40] * (x @ a[:, :40])) @ c[:40]) / 40**0.5
    np.testing.assert_allclose(ours, x @ w + term + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["input", "output"])
def test_s2ft_trains_few_channels(side):
    (made,) = S2ft.treat([KERNEL], {0: S2ftRule(match="**", rank=6, side=side, block=4)}, {"update.0.rank": 8})
    start, fixed = made.init(jax.random.key(0), {}, {})
    channels = np.asarray(fixed["channels"])
    assert not np.any(start["d"])
    assert np.all(np.sort(channels[0].reshape(2, 4) % 4, axis=1) == np.arange(4))  # whole blocks
    generator = np.random.default_rng(1)
    d, bias, x = (generator.standard_normal(shape) for shape in [start["d"].shape, (40,), (7, 24)])
    adapter = made.apply({}, {"d": jnp.asarray(d, jnp.float32)}, fixed, {"update.0.rank": 5.0}, None).adapters
    w = W[0].copy()
    if side == "input":
        w[channels[0, :5]] += d[0, :5]
    else:
        w[:, channels[0, :5]] += d[0, :, :5]
    np.testing.assert_allclose(layer_of(adapter["layers.mlp.up"], 0, x, W[0], bias), x @ w + bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        layer_of(adapter["layers.mlp.up"], 1, x, W[1], bias), x @ W[1] + bias, rtol=1e-4, atol=1e-5
    )
    assert sum(each.parameters for each in made.sizes({})) == 6 * (40 if side == "input" else 24)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (S2ftRule(match="**", rank=41), r"update\.0\.rank: 41 is above the 40 channels of .*; give at most 40"),
        (S2ftRule(match="**", rank=4, block=7), r"update\.0\.block: 7 does not divide the 40 channels .* is 5"),
    ],
)
def test_s2ft_s_channels_fit(rule, message):
    with pytest.raises(UserError, match=message):
        list(S2ft.treat([KERNEL], {0: rule}, {}))


def layer_of(adapter, layer, x, w, bias):
    """What an adapter of a stack makes in one layer."""
    one = jax.tree.map(lambda leaf: leaf[layer], adapter.scanned()).joined(adapter.unscanned())
    return one.product(FrozenLayer(*(jnp.asarray(each, jnp.float32) for each in (x, w, bias))))


@pytest.mark.parametrize("exact", [True, False])
def test_oft_turns_the_inputs(exact):
    (made,) = Oft.treat([KERNEL], {0: OftRule(match="**", block_size=6, exact=exact)}, {})
    generator = np.random.default_rng(1)
    entries, bias, x = (generator.standard_normal(shape) for shape in [(2, 4, 15), (40,), (7, 24)])
    entries *= 0.02
    turn = np.zeros((24, 24))
    for block, values in enumerate(entries[0]):
        q = np.zeros((6, 6))
        q[np.triu_indices(6, 1)] = values
        q, i = q - q.T, np.eye(6)
        series = i + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        place = slice(6 * block, 6 * block + 6)
        turn[place, place] = (i - q) @ np.linalg.inv(i + q) if exact else series
        np.testing.assert_allclose((i + q) @ np.linalg.inv(i - q), series, atol=1e-3)  # what the series is of
    np.testing.assert_allclose(turn @ turn.T, np.eye(24), atol=1e-12 if exact else 1e-3)
    arrays = {"r": jnp.asarray(entries, jnp.float32)}
    adapter = made.apply({}, arrays, {}, {}, None).adapters["layers.mlp.up"]
    np.testing.assert_allclose(layer_of(adapter, 0, x, W[0], bias), x @ turn @ W[0] + bias, rtol=1e-4, atol=1e-5)


def test_oft_s_blocks_fit():
    (made,) = Oft.treat([KERNEL], {0: OftRule(match="**", block_size=7)}, {})
    with pytest.raises(UserError, match=r"update\.0\.block_size: 7 does not divide the 24 inputs of .* is 6"):
        made.check({})
    both = dataclasses.replace(KERNEL, rules=(0, 1))
    rules = {0: OftRule(match="**", block_size=6), 1: OftRule(match="**", block_size=8)}
    (made,) = Oft.treat([both], rules, {})
    with pytest.raises(UserError, match="have other blocks"):
        made.check({})


def test_an_orthogonal_start_is_zero_at_any_rank():
    both = dataclasses.replace(KERNEL, rules=(0, 1))
    rules = {index: OrthogonalRule(match="**", rank=8) for index in (0, 1)}
    (made,) = Orthogonal.treat([both], rules, {"update.0.rank": 9})
    for ranks in ((8, 4), (9, 5), (1, 2)):
        values = dict(zip(made.rooms(), map(float, ranks), strict=True))
        arrays, _ = made.init(jax.random.key(0), {}, values)
        adapter = made.apply({}, arrays, {}, values, None).adapters["layers.mlp.up"]
        for layer, rank in enumerate(ranks):
            a, b = (np.asarray(one[layer], np.float64) for one in (adapter.a[..., :rank], adapter.b[:, :rank]))
            assert np.all(a @ b == 0.0)
            assert np.linalg.matrix_rank(a) == -(-rank // 2)
            assert np.linalg.matrix_rank(b) == rank // 2
    # The size of entries is that of PEFT's: normal, a tenth, turned by half of an orthogonal matrix.
    assert [float(np.std(arrays[name][:, :8] if name == "b" else arrays[name])) for name in "ab"] == pytest.approx(
        [0.1 / 2**0.5] * 2, rel=0.15
    )
