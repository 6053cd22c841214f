"""Paths and Hub ids to models and back to directories."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtune.errors import UserError
from jaxtune.models import loading
from jaxtune.models.config import DecoderConfig
from jaxtune.models.declarations import declare
from jaxtune.models.decoder import Decoder, split
from jaxtune.models.loading import check_model, load_model, random_model, resolve_path
from jaxtune.models.saving import save_model

CONFIG = DecoderConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    bos_token_id=1,
    eos_token_ids=(2,),
)


@pytest.fixture
def model() -> Decoder:
    generator = np.random.default_rng(0)
    return Decoder(
        CONFIG,
        {path: jnp.asarray(generator.normal(size=spec.shape), jnp.float32) for path, spec in declare(CONFIG).items()},
    )


def assert_same(a: Decoder, b: Decoder) -> None:
    assert a.config == b.config
    ours, theirs = split(a)[1], split(b)[1]
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(theirs[path]), err_msg=path)


def test_round_trip(model: Decoder, tmp_path: Path, mesh: Mesh) -> None:
    directory = tmp_path / "a" / "b"
    save_model(model, directory)
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert check_model(directory) == CONFIG
    again = load_model(directory, mesh)
    assert again.mesh is mesh
    assert_same(again, model)
    save_model(again, tmp_path / "from mesh")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "from mesh" / name).read_bytes() == (directory / name).read_bytes()


def test_dtype(model: Decoder, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    assert load_model(tmp_path).dtype == jnp.float32  # the platform's, on CPU
    assert load_model(tmp_path, dtype="auto").dtype == jnp.float32
    half = load_model(tmp_path, dtype="bfloat16")
    assert half.dtype == jnp.bfloat16
    save_model(half, tmp_path / "half")
    assert '"dtype": "bfloat16"' in (tmp_path / "half" / "config.json").read_text()
    assert_same(load_model(tmp_path / "half", dtype=jnp.bfloat16), half)


def test_random_model(model: Decoder, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def random_params(*arguments: Any) -> dict[str, jax.Array]:
        asked.append(arguments)
        return split(model)[1]

    monkeypatch.setattr(loading, "random_params", random_params)
    key = jax.random.key(3)
    assert random_model(CONFIG, key, mesh).mesh is mesh
    assert random_model(CONFIG, key, dtype="bfloat16").config == CONFIG
    assert asked == [(CONFIG, key, jnp.float32, mesh), (CONFIG, key, jnp.bfloat16, None)]


def test_missing_directories_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama-tiny").mkdir()
    with pytest.raises(UserError, match=r"there is no directory .*/lama-tiny; did you mean 'llama-tiny'\?"):
        load_model(tmp_path / "lama-tiny")
    with pytest.raises(UserError, match=r"there is no directory .*/x/y$"):
        load_model(tmp_path / "x" / "y")
    with pytest.raises(UserError, match=r"there is no config\.json"):
        load_model(tmp_path / "llama-tiny")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; a model is a directory"):
        load_model(tmp_path / "file")
    with pytest.raises(UserError, match=r"a revision \('main'\) is for Hub ids"):
        resolve_path(tmp_path / "llama-tiny", "main")
    monkeypatch.chdir(tmp_path)
    assert resolve_path("llama-tiny") == Path("llama-tiny")


def test_packaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "config.json").write_text("{}")
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "loading.py"))
    assert resolve_path("jaxtune:nano") == tmp_path / "nano"
    with pytest.raises(UserError, match=r"no model 'jaxtune:nani' in the package; did you mean 'jaxtune:nano'\?"):
        resolve_path("jaxtune:nani")


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        if name == "org/none":
            raise OSError("401 Client Error.\n\nRepository Not Found")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_path("org/model", "v1") == tmp_path
    assert asked[0][0] == "org/model"
    assert asked[0][1]["revision"] == "v1"
    patterns = asked[0][1]["allow_patterns"]
    assert {"config.json", "tokenizer.json", "model*.safetensors"} <= set(patterns)
    assert not any("bin" in pattern or ".py" in pattern for pattern in patterns)
    resolve_path("org/model", weights=False)
    assert not any("safetensors" in pattern for pattern in asked[1][1]["allow_patterns"])
    with pytest.raises(
        UserError, match=r"no directory org/none, and .* Hub .*: 401 Client Error\. Repository Not Found"
    ):
        load_model("org/none")


def test_unreachable_hub_without_network() -> None:
    """The real client, told to stay offline (tests/conftest.py)."""
    with pytest.raises(UserError, match=r"no directory org/never-seen, and no model could be had from the Hub"):
        load_model("org/never-seen")


def test_loading_needs_neither_transformers_nor_torch(model: Decoder, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    code = (
        "import sys, jaxtune.models, jaxtune.models.tokenizer\n"
        "from jaxtune.models import load_model, save_model\n"
        f"save_model(load_model({str(tmp_path)!r}), {str(tmp_path / 'again')!r})\n"
        "print(sorted({'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
