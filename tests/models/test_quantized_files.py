"""Checkpoints that come quantized: bitsandbytes' four bits, and 8-bit floats with a factor for each square."""

from __future__ import annotations

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jaxtune_kernels.quantized import NF4
from safetensors.numpy import load_file, save_file

from jaxtune.errors import UserError
from jaxtune.models import DecoderConfig, load_model, random_model, save_model, split
from jaxtune.models.quantized_files import as_floats
from jaxtune.models.tensor_files import read_header
from jaxtune.parallel import make_mesh

CONFIG = DecoderConfig(
    "llama", vocab_size=50, hidden_size=128, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=4,
    head_dim=32,
)  # fmt: skip


def four_bits(rows, columns, nested, seed):
    """The tensors of one matrix as bitsandbytes writes them, and its values, one at a time by the definition."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 16, (rows * columns)).astype(np.uint8)
    codes[::64] = 15  # the largest entry of a block is always ±1
    flat = codes.reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
    absmax = generator.uniform(0.5, 1.5, rows * columns // 64).astype(np.float32)
    tensors = {".absmax": absmax}
    if nested:
        held = generator.integers(0, 256, absmax.shape).astype(np.uint8)
        table = np.linspace(-1, 1, 256).astype(np.float32)
        factors = generator.uniform(0.1, 0.3, -(-len(absmax) // 256)).astype(np.float32)
        tensors = {".absmax": held, ".nested_absmax": factors, ".nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_offset": 0.75, "nested_dtype": "float32"}
        absmax = np.array([table[code] * factors[i // 256] + 0.75 for i, code in enumerate(held)], np.float32)
    said = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors |= {"": (flat[:, 0] << 4 | flat[:, 1])[:, None], ".quant_map": NF4}
    tensors[".quant_state.bitsandbytes__nf4"] = said
    values = np.array([NF4[code] * absmax[i // 64] for i, code in enumerate(codes)], np.float32)
    return tensors, values.reshape(rows, columns), codes.reshape(rows, columns)


@pytest.fixture
def directory(tmp_path):
    save_model(random_model(CONFIG, jax.random.key(0), dtype="float32"), tmp_path)
    return tmp_path


def rewrite(directory, replaced, said):
    """Puts other tensors in place of matrices, and says in config.json how these are quantized."""
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = {name: value for name, value in load_file(file).items() if name not in replaced}
    for name, parts in replaced.items():
        tensors |= {f"{name}{end}": value for end, value in parts.items()}
    save_file(tensors, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": said}))


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes(directory, nested):
    """Read as floats they are what the codes stand for; read as nf4, on a mesh as well, they are those codes."""
    name = "model.layers.1.mlp.down_proj.weight"
    tensors, values, codes = four_bits(128, 192, nested, seed=1)
    rewrite(directory, {name: tensors}, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    floats = split(load_model(directory, dtype="float32"))[1]
    np.testing.assert_allclose(floats["layers.mlp.down.kernel"][1].T, values, rtol=1e-6)
    for mesh in (None, make_mesh(1, 2, 2, jax.devices()[:4])):
        held = split(load_model(directory, mesh, dtype="float32", quantize="nf4"))[1]
        found = np.asarray(held["layers.mlp.down.kernel.codes"][1]).astype(np.uint8)
        np.testing.assert_array_equal(found.T, codes)
    entry = as_floats(read_header(directory / "model.safetensors")[0])[name]
    np.testing.assert_allclose(entry.read(slice(3, 5), slice(64, 128)), values[3:5, 64:128], rtol=1e-6)


def test_eight_bit_floats_in_squares(directory):
    name, generator = "model.layers.0.self_attn.q_proj.weight", np.random.default_rng(0)
    held = generator.standard_normal((128, 128)).astype(ml_dtypes.float8_e4m3fn)
    factors = generator.uniform(0.5, 1.5, (2, 2)).astype(np.float32)
    said = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}
    rewrite(directory, {name: {"": held, "_scale_inv": factors}}, said)
    values = held.astype(np.float32) * np.kron(factors, np.ones((64, 64), np.float32))
    found = split(load_model(directory, dtype="float32"))[1]["layers.attention.q.kernel"][0]
    np.testing.assert_array_equal(found.T, values)
    entry = as_floats(read_header(directory / "model.safetensors")[0])[name]
    np.testing.assert_array_equal(entry.read(slice(60, 70), slice(50, 100)), values[60:70, 50:100])


def test_what_cannot_be_read_is_told(directory):
    tensors, _, _ = four_bits(128, 192, False, seed=0)
    name = "model.layers.1.mlp.down_proj.weight"
    del tensors[".quant_map"]
    rewrite(directory, {name: tensors}, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match=r"down_proj.weight: its quantization cannot be read"):
        load_model(directory)
    rewrite(directory, {}, {"quant_method": "gptq"})
    with pytest.raises(UserError, match=r"give the checkpoint that these were made of, and set model\.quantize"):
        load_model(directory)
