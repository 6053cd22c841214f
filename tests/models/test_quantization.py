"""A decoder whose layers hold codes: how it is read and cut, what it takes, what moves, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtune_kernels import quantize

from jaxtune.errors import UserError
from jaxtune.models import Decoder, DecoderConfig, load_model, merge, random_model, save_model, split
from jaxtune.models import checkpoint as reading
from jaxtune.models.declarations import abstract_params, check_params, declare, held, shardings
from jaxtune.models.loading import quantized_config
from jaxtune.models.weight import quantized_stack
from jaxtune.parallel import make_mesh

CONFIG = DecoderConfig(
    "llama", vocab_size=50, hidden_size=128, intermediate_size=96, num_layers=6, num_heads=4, num_kv_heads=2,
    head_dim=32, qkv_bias=True, output_bias=True,
)  # fmt: skip
LOOKED_AT = ("layers.attention.q.kernel", "layers.mlp.down.kernel")
KERNELS = [path for path in declare(CONFIG) if path.startswith("layers.") and path.endswith(".kernel")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The model, random, and its directory."""
    model = random_model(CONFIG, jax.random.key(0), dtype="float32")
    directory = tmp_path_factory.mktemp("model")
    save_model(model, directory)
    return split(model)[1], directory


def host(array):
    return np.asarray(array.astype(jnp.float32) if array.dtype == jnp.uint4 else array).astype(np.float32)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_codes_are_read_in_pieces_and_cut_over_a_mesh(saved, kind, monkeypatch):
    """As each layer's kernel quantized by itself, whatever pieces and shares it was read in; the rest as it is."""
    params, directory = saved
    monkeypatch.setattr(reading, "PIECE_BYTES", 128 * 4 * 24)
    mesh = make_mesh(2, 2, 2)
    model = load_model(directory, mesh, dtype="float32", quantize=kind)
    found = split(model)[1]
    check_params(model.config, found)
    assert {path: array.sharding for path, array in found.items()} == shardings(model.config, mesh)
    for path, array in params.items():
        if path not in KERNELS:
            np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(array))
    for path in LOOKED_AT:
        wanted = jax.jit(jax.vmap(lambda kernel: quantize(kernel, kind)))(params[path])
        np.testing.assert_array_equal(host(found[f"{path}.codes"]), host(wanted.codes))
        np.testing.assert_array_equal(host(found[f"{path}.absmax"]), host(wanted.absmax))


def test_blocks_are_never_cut():
    """Where blocks do not divide over the devices, codes are whole although their inputs would divide."""
    mesh, config = make_mesh(1, 4, 1, jax.devices()[:4]), quantized_config(CONFIG, "nf4")
    for path, place in shardings(config, mesh).items():
        if path.endswith((".q.kernel.codes", ".q.kernel.absmax")):
            assert place.is_fully_replicated
    assert not shardings(quantized_config(CONFIG, "int8"), mesh)["layers.attention.q.kernel.codes"].is_fully_replicated


def compiled_gradient(kind, mesh=None, written_out=False):
    """The gradient of the embeddings; with ``written_out`` by plain autodiff of the dequantized kernels."""
    config = quantized_config(CONFIG, kind)
    static, params = split(Decoder(config, abstract_params(config, jnp.float32, mesh), mesh))
    plain = split(Decoder(CONFIG, abstract_params(CONFIG, jnp.float32, mesh), mesh))[0]
    tokens = jnp.zeros((4, 8), jnp.int32)

    def loss(table, params):
        params = params | {"embed.table": table}
        if not written_out:
            return jnp.sum(merge(static, params).hidden(tokens))
        stacks = {path: quantized_stack(params, path) for path in KERNELS}
        floats = params | {path: stack.dequantized(jnp.float32) for path, stack in stacks.items() if stack is not None}
        floats = {path: floats[path] for path in declare(CONFIG)}
        return jnp.sum(merge(plain, floats).hidden(tokens))

    return jax.jit(jax.grad(loss)).lower(params["embed.table"], params).compile()


def test_codes_take_their_bits_and_nothing_else_is_kept():
    """Bits counted from XLA's arguments; what the backward pass keeps, from temporaries of a step without remat."""
    entries = sum(declare(CONFIG)[path].size for path in KERNELS)
    others = sum(spec.size for path, spec in declare(CONFIG).items() if path not in KERNELS)
    memory: dict[str | None, Any] = {kind: compiled_gradient(kind).memory_analysis() for kind in (None, "nf4")}
    assert 8 * (memory["nf4"].argument_size_in_bytes - 4 * others) / entries <= 4.5
    base = memory[None].temp_size_in_bytes
    # A CPU unpacks codes of four bits to bytes; kernels of float32 would take four times as much, as autodiff's do.
    assert memory["nf4"].temp_size_in_bytes - base < 1.3 * entries
    naive: Any = compiled_gradient("nf4", written_out=True).memory_analysis()
    assert naive.temp_size_in_bytes - base >= 4 * entries


def test_codes_move_between_devices_and_kernels_do_not():
    text = compiled_gradient("nf4", make_mesh(2, 2, 2)).as_text() or ""
    gathered = re.findall(r"= \(?(\w+)\[([\d,]+)\]\S* all-gather", text)
    kernels = {tuple(sorted(spec.shape[1:])) for spec in (declare(CONFIG)[path] for path in KERNELS)}
    whole = (
        kernels | {tuple(sorted((a, b // 2))) for a, b in kernels} | {tuple(sorted((a // 2, b))) for a, b in kernels}
    )
    of_kernels = {
        dtype
        for dtype, shape in gathered
        if tuple(sorted(size for size in map(int, shape.split(",")) if size > 1)) in whole
    }
    assert of_kernels <= {"u4", "u8"}
    assert of_kernels


def test_a_saved_model_is_written_out(saved, tmp_path):
    """bfloat16 of what the codes stand for; its card says that they were codes."""
    params, directory = saved
    save_model(load_model(directory, dtype="float32", quantize="nf4"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert "held as nf4 codes" in (tmp_path / "README.md").read_text()
    found = split(load_model(tmp_path, dtype="float32"))[1]
    for path in LOOKED_AT:
        wanted = jax.jit(jax.vmap(lambda kernel: quantize(kernel, "nf4").dequantized(jnp.float32)))(params[path])
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(wanted.astype(jnp.bfloat16), np.float32))


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(UserError, match=r"model.quantize: there is no 'nf5'; did you mean 'nf4'"):
        quantized_config(CONFIG, "nf5")
    narrow = dataclasses.replace(CONFIG, intermediate_size=100)
    with pytest.raises(
        UserError, match=r"layers.mlp.down.kernel: 100 inputs are no whole blocks .* choose int8 or fp8"
    ):
        quantized_config(narrow, "nf4")
    assert held(quantized_config(narrow, "int8"))["layers.mlp.down.kernel.absmax"].shape == (6, 1, 128)
