"""Weights from files to arrays: names, shapes, dtypes, pieces, shards, memory, and everything that does not fit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from jaxtune.errors import UserError
from jaxtune.models import checkpoint
from jaxtune.models.checkpoint import find_weights, load_params, save_params
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import Params, declare, shardings
from jaxtune.models.tensor_files import TensorEntry

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
    output_bias=True,
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


def arrays(config: DecoderConfig, dtype: Any = np.float32) -> Params:
    """Random parameters, made by NumPy: nothing to compile."""
    generator = np.random.default_rng(0)
    return {
        path: jnp.asarray(generator.standard_normal(spec.shape, np.float32), dtype)
        for path, spec in declare(config).items()
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_params(arrays(CONFIG), CONFIG, tmp_path)
    return tmp_path


def same(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> bool:
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and np.array_equal(np.asarray(a[path]), np.asarray(b[path])) for path in a
    )


def test_round_trip_and_layout(saved: Path) -> None:
    params = arrays(CONFIG)
    assert same(load_params(saved, CONFIG), params)
    held = load_file(saved / "model.safetensors")
    np.testing.assert_array_equal(
        held["model.layers.2.self_attn.k_proj.weight"], np.asarray(params["layers.attention.k.kernel"][2]).T
    )
    np.testing.assert_array_equal(held["lm_head.weight"], np.asarray(params["lm_head.kernel"]).T)


@pytest.mark.parametrize("piece", [1, 100, 1000])
def test_pieces_and_mesh_change_nothing(saved: Path, mesh: Mesh, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_params(saved, CONFIG)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", piece)
    assert same(load_params(saved, CONFIG), whole)
    cut = load_params(saved, CONFIG, mesh=mesh)
    assert same(cut, whole)
    assert {path: array.sharding for path, array in cut.items()} == shardings(CONFIG, mesh)
    assert cut["layers.mlp.gate.kernel"].addressable_shards[0].data.shape == (3, 8, 12)


def test_each_byte_is_read_once_however_many_devices_hold_it(
    saved: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0
    original = TensorEntry.read

    def counted(self: TensorEntry, *block: slice) -> np.ndarray:
        nonlocal count
        part = original(self, *block)
        count += part.nbytes
        return part

    monkeypatch.setattr(TensorEntry, "read", counted)
    load_params(saved, CONFIG, mesh=mesh)
    assert count == sum(4 * spec.size for spec in declare(CONFIG).values())


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_dtypes_of_files(saved: Path, stored: Any, wanted: Any) -> None:
    torch = pytest.importorskip("torch")

    path = saved / "model.safetensors"
    save_file({name: value.astype(stored) for name, value in load_file(path).items()}, path)
    loaded = load_params(saved, CONFIG, wanted)
    name, layer = "model.layers.1.mlp.up_proj.weight", 1
    torch_dtype = {jnp.float32: torch.float32, jnp.bfloat16: torch.bfloat16}[wanted]
    # Every stored dtype fits into float64, and torch rounds once from there, to nearest even.
    value = torch.from_numpy(load_file(path)[name].astype(np.float64)).to(torch_dtype).to(torch.float32).numpy()
    assert loaded["layers.mlp.up.kernel"].dtype == wanted
    np.testing.assert_array_equal(np.asarray(loaded["layers.mlp.up.kernel"][layer].astype(jnp.float32)).T, value)


def test_bfloat16_round_trip_is_bitwise(tmp_path: Path) -> None:
    params = arrays(CONFIG, jnp.bfloat16)
    save_params(params, CONFIG, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert same(load_params(tmp_path, CONFIG, jnp.bfloat16), params)


def test_several_files_and_an_index(saved: Path, mesh: Mesh) -> None:
    params = load_params(saved, CONFIG, mesh=mesh)
    save_params(params, CONFIG, saved, max_shard_bytes=6000)
    names = sorted(path.name for path in saved.iterdir())
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert "model.safetensors" not in names  # the earlier single file would win over the index
    assert len(names) > 3
    assert set(index["weight_map"].values()) == {name for name in names if name.endswith(".safetensors")}
    assert index["metadata"]["total_size"] == sum(4 * spec.size for spec in declare(CONFIG).values())
    assert all((saved / name).stat().st_size < 6000 + 8000 for name in names)
    assert same(load_params(saved, CONFIG), params)
    save_params(params, CONFIG, saved)
    assert [path.name for path in saved.iterdir()] == ["model.safetensors"]


def test_all_mismatches_are_in_one_message(saved: Path) -> None:
    path = saved / "model.safetensors"
    held = load_file(path)
    del held["model.norm.weight"]
    del held["model.layers.0.mlp.up_proj.weight"]
    for layer in range(3):
        held[f"model.layers.{layer}.self_attn.q_proj.weight"] = np.zeros((4, 4), np.float32)
    held["model.layers.1.mlp.up_proj.bias"] = np.zeros(24, np.float32)
    held["model.layers.2.input_layernorm.weight"] = np.zeros(16, np.int8)
    save_file(held, path)
    with pytest.raises(UserError) as error:
        find_weights(saved, CONFIG)
    message = str(error.value)
    assert message.startswith(str(saved))
    for part in (
        "model.norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.layers.0-2.self_attn.q_proj.weight has shape (4, 4), not (24, 16)",
        "model.layers.1.mlp.up_proj.bias is not a weight of this model",
        "model.layers.2.input_layernorm.weight has dtype I8",
    ):
        assert part in message
    assert "\n" not in message


def test_truncated_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated: its header promises \d+ bytes, it has"):
        load_params(saved, CONFIG)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match="truncated") as error:
        load_params(saved, CONFIG)
    assert "is missing" not in str(error.value)  # what an unreadable file lacks, nobody knows


def test_faults_of_several_files_are_told_together(saved: Path) -> None:
    save_params(load_params(saved, CONFIG), CONFIG, saved, max_shard_bytes=6000)
    files = sorted(saved.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(UserError) as error:
        load_params(saved, CONFIG)
    assert f"{files[0].name} is named in model.safetensors.index.json and is not there" in str(error.value)
    assert f"{files[1].name} is truncated" in str(error.value)
    assert "is missing" not in str(error.value)


def test_an_index_cannot_leave_its_directory(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").rename(tmp_path / "outside.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    names = {"model.norm.weight": "../outside.safetensors"}
    (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="is not there"):
        load_params(inner, CONFIG)
    (inner / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as an index"):
        load_params(inner, CONFIG)


def test_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_params(tmp_path, CONFIG)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which can run code and is never read"):
        load_params(tmp_path, CONFIG)


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(tmp_path: Path) -> None:
    params = arrays(TIED)
    save_params(params, TIED, tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    assert "lm_head.weight" not in held
    table = held["model.embed_tokens.weight"]
    save_file({**held, "lm_head.weight": table, "model.layers.0.self_attn.rotary_emb.inv_freq": table[:3, 0]}, path)
    assert same(load_params(tmp_path, TIED), params)
    save_file({**held, "lm_head.weight": table + 1}, path)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        load_params(tmp_path, TIED)


MEMORY = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jaxtune.models.checkpoint import load_params, save_params
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import declare
from jaxtune.parallel.mesh import make_mesh

def config(scale):
    return DecoderConfig(
        family="llama", vocab_size=64 * scale, hidden_size=4 * scale, intermediate_size=16 * scale, num_layers=2,
        num_heads=2, num_kv_heads=2, head_dim=2 * scale, tie_embeddings=True,
    )

def memory(field):
    # Not getrusage: its peak goes on from that of the process that started this one.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

directory, devices = Path(sys.argv[1]), int(sys.argv[2])
if devices == 0:
    for name, scale in (("small", 8), ("large", 256)):
        (directory / name).mkdir()
        params = {path: jnp.ones(spec.shape) for path, spec in declare(config(scale)).items()}
        save_params(params, config(scale), directory / name)
    sys.exit()
mesh = None if devices == 1 else make_mesh(1, 4, 2)
jax.block_until_ready(load_params(directory / "small", config(8), mesh=mesh))  # imports and pools
before = memory("VmRSS")
params = jax.block_until_ready(load_params(directory / "large", config(256), mesh=mesh))
peak = memory("VmHWM") - before
result = sum(shard.data.nbytes for array in params.values() for shard in array.addressable_shards)
largest = params["embed.table"].nbytes
print(peak, result, largest)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 168 MB, its largest tensor 67 MB."""
    directory = tmp_path_factory.mktemp("large")
    _run_memory_script(directory, 0)
    return directory


def _run_memory_script(directory: Path, devices: int) -> list[int]:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={max(devices, 1)}",
    }
    command = [sys.executable, "-c", MEMORY, str(directory), str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident memory from /proc")
@pytest.mark.parametrize("devices", [1, 8])
def test_peak_host_memory(large: Path, devices: int) -> None:
    peak, result, largest = _run_memory_script(large, devices)
    print(f"{devices} devices: peak {peak / 1e6:.0f} MB, result {result / 1e6:.0f} MB, largest {largest / 1e6:.0f} MB")
    assert peak > 0.9 * result  # else this measures nothing
    assert peak < result + 1.2 * largest
