"""The decoder: packing, adapters, remat, depth, populations, meshes, and the bridge to plain pytrees."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.models.config import DecoderConfig, RopeConfig
from jaxtune.models.declarations import (
    abstract_params,
    count_parameters,
    declare,
    linear_modules,
    random_params,
    shardings,
)
from jaxtune.models.decoder import REMAT, Decoder, _hidden, _remat, merge, split
from jaxtune.models.linear import LowRankAdapter, linear
from tests.kernels.masked_update.compiled import kernels

RANK = 3
FEATURES = {
    "norm_plus_one": True,
    "post_norms": True,
    "qk_norm": True,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "activation": "gelu_tanh",
    "local_rope": RopeConfig(theta=50.0),
    "rope": RopeConfig(1e4, "linear", 2.0),
    "query_pre_attn_scalar": 11.0,
    "attention_soft_cap": 4.0,
    "final_soft_cap": 6.0,
    "embedding_scale": 3.3,
}


def config(num_layers: int = 3, **fields) -> DecoderConfig:
    """Every feature on, layers with and without a window, and weights so large that they all matter."""
    windows = tuple(5 if layer % 2 == 0 else None for layer in range(num_layers))
    values = {"windows": windows, "initializer_range": 0.3, **FEATURES, **fields}
    return DecoderConfig("test", 53, 32, 48, num_layers, 4, 2, 8, **values)


@functools.cache
def decoder(num_layers: int = 3, **fields) -> Decoder:
    made = config(num_layers, **fields)
    return Decoder(made, random_params(made, jax.random.key(0)))


def random_adapters(made: DecoderConfig, modules: tuple[str, ...], seed: int = 0) -> dict[str, LowRankAdapter]:
    random = np.random.default_rng(seed)
    adapters = {}
    for path in modules:
        *layers, inputs, outputs = declare(made)[f"{path}.kernel"].shape
        a, b = random.normal(size=(*layers, inputs, RANK)), random.normal(size=(*layers, RANK, outputs))
        scale = jnp.asarray(0.02 + 0.01 * random.random(layers), jnp.float32)
        adapters[path] = LowRankAdapter(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), scale)
    return adapters


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 53, shape).astype(np.int32)


# Packing


def test_packed_documents_equal_separate_ones() -> None:
    model = decoder()
    documents = [random_tokens(1, length, seed=length) for length in (7, 9, 4)]
    row = np.concatenate([*documents, np.zeros((1, 3), np.int32)], axis=1)
    segment_ids = np.repeat([1, 2, 3, 0], [7, 9, 4, 3])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (7, 9, 4, 3)])[None].astype(np.int32)
    packed = np.asarray(model(row, positions, segment_ids))
    np.testing.assert_array_equal(packed, model(row, segment_ids=segment_ids))
    start = 0
    for document in documents:
        alone = np.asarray(model(document))
        end = start + document.shape[1]
        assert np.abs(alone).max() > 1
        np.testing.assert_allclose(packed[:, start:end], alone, atol=1e-5)
        start = end


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_any_packing_equals_one_document_a_row(lengths: list[int], seed: int) -> None:
    model, width = decoder(), 24
    lengths = [n for i, n in enumerate(lengths) if sum(lengths[: i + 1]) <= width]
    packed, segment_ids = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    alone = {}
    start = 0
    for number, length in enumerate(lengths, start=1):
        document = random_tokens(length, seed=seed + number)
        packed[0, start : start + length], segment_ids[0, start : start + length] = document, number
        row, own = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
        row[0, :length], own[0, :length] = document, 1
        alone[start] = np.asarray(model(row, segment_ids=own))[0, :length]
        start += length
    together = np.asarray(model(packed, segment_ids=segment_ids))[0]
    for start, expected in alone.items():
        np.testing.assert_allclose(together[start : start + len(expected)], expected, atol=1e-5)


def test_gradient_of_adapters_is_finite_and_padding_adds_nothing() -> None:
    model = decoder()
    adapters = random_adapters(model.config, linear_modules(model.config))
    tokens, segment_ids = random_tokens(3, 12), np.ones((3, 12), np.int32)
    segment_ids[1, 8:] = 0
    segment_ids[2] = 0

    def loss(adapters: dict, rows: int) -> jax.Array:
        logits = model(tokens[:rows], segment_ids=segment_ids[:rows], adapters=adapters)
        return jnp.sum(jax.nn.log_softmax(logits)[..., 7] * (segment_ids[:rows] > 0))

    padded, plain = (jax.grad(loss)(adapters, rows) for rows in (3, 2))
    for path in adapters:
        for name in ("a", "b"):
            value, expected = getattr(padded[path], name), getattr(plain[path], name)
            assert float(jnp.max(jnp.abs(expected))) > 0, path
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4, err_msg=path)


# Adapters


@pytest.mark.parametrize("path", linear_modules(config()))
def test_an_adapter_equals_the_merged_kernel(path: str) -> None:
    model, tokens = decoder(), random_tokens(2, 12)
    adapter = random_adapters(model.config, (path,))[path]
    static, params = split(model)
    update = np.einsum("...ir,...ro->...io", adapter.a, adapter.b) * np.asarray(adapter.scale)[..., None, None]
    merged = merge(static, {**params, f"{path}.kernel": params[f"{path}.kernel"] + update})
    expected = np.asarray(merged(tokens))
    assert np.abs(expected - np.asarray(model(tokens))).max() > 0.05
    np.testing.assert_allclose(model(tokens, adapters={path: adapter}), expected, atol=3e-5)


def test_dropout_does_not_depend_on_packing() -> None:
    model = decoder()
    dropout = {"dropout_rate": jnp.full(3, 0.5), "dropout_seed": jnp.arange(3, dtype=jnp.uint32)}
    made = random_adapters(model.config, ("layers.attention.q", "layers.mlp.down"))
    adapters = {k: LowRankAdapter(v.a, v.b, 10 * v.scale, **dropout) for k, v in made.items()}
    documents = [random_tokens(1, length, seed=length) for length in (5, 6)]
    rows = [np.arange(length, dtype=np.uint32)[None] + 100 * length for length in (5, 6)]
    segment_ids = np.repeat([1, 2], [5, 6])[None].astype(np.int32)
    packed = model(
        np.concatenate(documents, 1), segment_ids=segment_ids, adapters=adapters, rows=np.concatenate(rows, 1)
    )
    alone = [model(d, adapters=adapters, rows=r) for d, r in zip(documents, rows, strict=True)]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=2e-5)
    other = model(documents[1], adapters=adapters, rows=rows[1] + np.uint32(1))
    assert np.abs(np.asarray(other - alone[1])).max() > 1e-2


def test_a_population_of_adapters_shares_the_base() -> None:
    model, tokens, trials = decoder(4), random_tokens(2, 17), 3
    static, params = split(model)
    modules = linear_modules(model.config)
    members = [random_adapters(model.config, modules, seed) for seed in range(trials)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)

    def loss(adapters: dict, params: dict, remat: str) -> jax.Array:
        return jnp.sum(merge(static, params)(tokens, adapters=adapters, remat=remat) ** 2)

    step = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, None, None)), static_argnums=2)
    compiled = step.lower(stacked, params, "dots").compile()
    text = compiled.as_text()
    for path in modules:
        shape = declare(model.config)[f"{path}.kernel"].shape
        for copies in (shape, shape[1:]):
            # The adapters' A and B have other shapes than K kernels, so a match would be a copied base.
            assert f"f32[{','.join(map(str, (trials, *copies)))}]" not in text, path
    gradients = compiled(stacked, params)
    alone = jax.grad(loss)(members[1], params, "dots")
    for path in modules:
        largest = float(jnp.max(jnp.abs(alone[path].b)))
        np.testing.assert_allclose(gradients[path].b[1] / largest, alone[path].b / largest, atol=2e-5, err_msg=path)


# Remat and depth


def test_remat_gives_the_same_gradients_and_keeps_less() -> None:
    model, tokens = decoder(), random_tokens(2, 32)
    adapters = random_adapters(model.config, linear_modules(model.config))
    gradients, kept = {}, {}
    for policy in REMAT:

        def loss(adapters: dict, policy: str = policy) -> jax.Array:
            return jnp.sum(model(tokens, adapters=adapters, remat=policy) ** 2)

        gradients[policy] = jax.grad(loss)(adapters)
        residuals = jax.eval_shape(lambda adapters, loss=loss: jax.vjp(loss, adapters)[1], adapters)
        kept[policy] = sum(leaf.size for leaf in jax.tree.leaves(residuals))
    for policy in ("dots", "full"):
        for actual, expected in zip(
            jax.tree.leaves(gradients[policy]), jax.tree.leaves(gradients["none"]), strict=True
        ):
            largest = float(jnp.max(jnp.abs(expected)))
            np.testing.assert_allclose(actual / largest, expected / largest, atol=1e-5)
    assert kept["none"] >= kept["dots"] > 1.3 * kept["full"]


@pytest.mark.parametrize(("remat", "launches"), [("none", 2), ("dots", 2), ("full", 3)])
def test_dots_launches_no_projection_again(remat: str, launches: int) -> None:
    """One launch forward, one backward: the backward pass needs y and h, which are of one launch, so both are kept."""
    adapter = LowRankAdapter(jnp.ones((128, 4)), jnp.ones((4, 128)), jnp.float32(1.0))
    kernel = jnp.ones((128, 128))

    def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(linear(x, kernel, None, adapter, kernels="interpret")), None

    gradient = jax.grad(lambda x: jnp.sum(jax.lax.scan(_remat(layer, remat, "cpu"), x, None, length=2)[0]))
    assert len(kernels(jax.make_jaxpr(gradient)(jnp.ones((8, 128))).jaxpr)) == launches


@pytest.mark.parametrize("remat", REMAT)
def test_the_program_does_not_grow_with_depth(remat: str) -> None:
    sizes = {}
    for num_layers in (2, 8):
        made = config(num_layers)
        static, _ = split(Decoder(made, abstract_params(made)))
        adapters = jax.eval_shape(lambda made=made: random_adapters(made, ("layers.attention.q",)))

        def loss(adapters: dict, params: dict, static=static) -> jax.Array:
            return jnp.sum(merge(static, params)(jnp.zeros((1, 8), jnp.int32), adapters=adapters, remat=remat))

        sizes[num_layers] = len(jax.jit(jax.grad(loss)).lower(adapters, abstract_params(made)).as_text())
    assert sizes[8] < 1.05 * sizes[2]


def test_only_mixed_windows_branch() -> None:
    for windows, branches in (((5, None), True), ((5, 5), False), ((None, None), False)):
        model = decoder(2, windows=windows)
        assert ("cond[" in str(jax.make_jaxpr(lambda t, model=model: model(t))(random_tokens(1, 6)))) == branches


# Meshes and dtypes


def test_eight_devices_equal_one(mesh: jax.sharding.Mesh) -> None:
    made = config()
    tokens, segment_ids = random_tokens(4, 12), np.ones((4, 12), np.int32)
    segment_ids[0, 6:] = 2
    adapters = random_adapters(made, linear_modules(made))
    values = {}
    for name, place in (("one", None), ("eight", mesh)):
        params = random_params(made, jax.random.key(0), mesh=place)
        static, params = split(Decoder(made, params, place))

        def run(adapters: dict, params: dict, static=static) -> tuple[jax.Array, jax.Array]:
            logits = merge(static, params)(tokens, segment_ids=segment_ids, adapters=adapters)
            return jnp.mean(logits**2), logits

        (_, logits), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(adapters, params)
        values[name] = jax.device_get((params, logits, gradients))
    for one, eight in zip(*(jax.tree.leaves(values[name]) for name in ("one", "eight")), strict=True):
        np.testing.assert_allclose(eight, one, atol=1e-5 * max(1.0, float(np.abs(one).max())))


def test_parameters_are_born_on_the_mesh(mesh: jax.sharding.Mesh) -> None:
    made = config()
    params, places = random_params(made, jax.random.key(0), mesh=mesh), shardings(made, mesh)
    for path, value in params.items():
        assert value.sharding == places[path]
    kernel = params["layers.mlp.up.kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // 2, 48 // 2)
    assert abstract_params(made, mesh=mesh)["layers.mlp.up.kernel"].sharding == kernel.sharding
    assert sum(value.size for value in params.values()) == count_parameters(made)


def test_bfloat16_computes_in_bfloat16_and_gives_float32_logits() -> None:
    made, tokens = config(initializer_range=0.1), random_tokens(2, 12)
    wide = random_params(made, jax.random.key(0))
    # An update may keep one array in float32; the compute dtype stays that of the model.
    static, _ = split(Decoder(made, {path: value.astype(jnp.bfloat16) for path, value in wide.items()}))
    narrow = {path: value if "up" in path else value.astype(jnp.bfloat16) for path, value in wide.items()}
    model = merge(static, {**narrow, "embed.table": wide["embed.table"]})
    assert model.hidden(tokens).dtype == jnp.bfloat16
    logits = model(tokens)
    assert logits.dtype == jnp.float32
    expected = np.asarray(Decoder(made, wide)(tokens))
    assert np.abs(logits - expected).mean() < 0.03 * np.abs(expected).mean() + 0.03


# The bridge, and what is refused


def test_split_and_merge_are_inverse_and_static_is_a_key() -> None:
    model, tokens = decoder(), random_tokens(2, 8)
    static, params = split(model)
    assert list(params) == list(declare(model.config))
    assert static == split(merge(static, params))[0]
    assert hash(static) == hash(split(decoder())[0])

    @jax.jit
    def run(params: dict) -> jax.Array:
        return merge(static, params)(tokens)

    np.testing.assert_allclose(run(params), model(tokens), atol=1e-5)
    other = {**params, "final_norm.scale": params["final_norm.scale"] + 1}
    assert not np.allclose(run(other), run(params), atol=1e-2)
    assert run._cache_size() == 1

    def step(scale: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        loss = lambda scale: jnp.mean(merge(static, {**params, "final_norm.scale": scale})(tokens) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(scale)
        return scale - 0.1 * gradient, value

    losses = jax.lax.scan(step, params["final_norm.scale"], length=4)[1]
    assert np.all(np.diff(losses) < 0)


def test_calls_outside_of_jit_compile_once() -> None:
    model, tokens = decoder(num_layers=2), random_tokens(3, 9)
    model(tokens)
    compiled = _hidden._cache_size()
    model(tokens + 1)
    assert _hidden._cache_size() == compiled


def test_misfitting_parameters_are_all_named() -> None:
    made = config()
    params = dict(random_params(made, jax.random.key(0)))
    del params["final_norm.scale"]
    params["layers.attention.q.kernel"] = params["layers.attention.q.kernel"][:, :, :4]
    params["layers.attention.w.kernel"] = params["lm_head.kernel"]
    with pytest.raises(ValueError, match=r"final_norm.scale is missing") as error:
        Decoder(made, params)
    assert "layers.attention.w.kernel is not" in str(error.value)
    assert "layers.attention.q.kernel has shape (3, 32, 4), not (3, 32, 32)" in str(error.value)


def test_wrong_arguments_are_named() -> None:
    model, tokens = decoder(), random_tokens(2, 8)
    for name in ("positions", "segment_ids"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 7\), but tokens has \(2, 8\)"):
            model(tokens, **{name: np.ones((2, 7), np.int32)})
    with pytest.raises(ValueError, match=r"remat policy 'dot'.*'dots'"):
        model(tokens, remat="dot")
    adapter = random_adapters(model.config, ("layers.attention.q",))["layers.attention.q"]
    with pytest.raises(ValueError, match=r"did you mean .*'layers.attention.q'"):
        model(tokens, adapters={"layers.attention.Q": adapter})
    with pytest.raises(ValueError, match=r"adapter of layers.mlp.up has A \(3, 32, 3\) and B \(3, 3, 32\)"):
        model(tokens, adapters={"layers.mlp.up": adapter})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": (4, 5, None)}, r"\[4, 5\]"),
        ({"windows": (4,)}, "1 entries for 3 layers"),
        ({"norm_eps": 1e-5, "max_position_embeddings": 0}, "max_position_embeddings"),
    ],
)
def test_wrong_configurations_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)
