"""A model at a revision of the Hub: weights, tokenizer and what is exported are those of that revision.

The Hub's real client, offline, on a cache that holds two revisions of one model.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.models import load_model, load_tokenizer, random_model, read_config, resolve_path, save_model

WORDS = "w1 w2 w3 :"


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_model) -> Path:
    """``org/model``: main is the tiny model, v1 has other weights, and a tokenizer that numbers two words otherwise."""
    cache = tmp_path_factory.mktemp("hub")
    root = cache / "models--org--model"
    (root / "refs").mkdir(parents=True)
    for index, name in enumerate(("main", "v1")):
        commit = f"{index + 1}" * 40
        (root / "refs" / name).write_text(commit)
        save_model(
            random_model(read_config(tiny_model), jax.random.key(index)),
            root / "snapshots" / commit,
            tokenizer_from=tiny_model,
        )
    path = root / "snapshots" / ("2" * 40) / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    path.write_text(json.dumps(values))
    return cache


@pytest.fixture(autouse=True)
def offline(hub, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))


@pytest.fixture
def trained(config_file, tmp_path, capsys):
    """Trains two steps on ``org/model`` at v1, with more arguments; gives the run's folder."""

    def run(*arguments: str) -> Path:
        changes = ["train.steps=2", "data.validation=null", "data.test=null", "optimizer.learning_rate=0.1"]
        code = main(
            ["train", str(config_file), "model.path=org/model", "model.revision=v1", *changes, *arguments, "--json"]
        )
        assert code == 0, capsys.readouterr().err
        return tmp_path / "run"

    return run


def test_what_is_exported_is_of_the_revision(trained, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")

    run = trained()
    assert main(["export", str(run / "config.yaml"), "--merged", str(tmp_path / "merged")]) == 0
    assert main(["export", str(run / "config.yaml"), "--peft", str(tmp_path / "peft")]) == 0
    for adapter in (run / "adapter", tmp_path / "peft"):
        values = json.loads((adapter / "adapter_config.json").read_text())
        assert (values["base_model_name_or_path"], values["revision"]) == ("org/model", "v1")
        assert "`org/model` at revision `v1`" in (adapter / "README.md").read_text()

    ids = load_tokenizer("org/model", "v1")(WORDS)["input_ids"]
    assert ids != load_tokenizer("org/model")(WORDS)["input_ids"]
    assert load_tokenizer(tmp_path / "merged")(WORDS)["input_ids"] == ids

    tokens = np.array([ids], np.int32)
    merged = np.asarray(load_model(tmp_path / "merged", dtype="float32")(tokens))
    base = np.asarray(load_model("org/model", dtype="float32", revision="v1")(tokens))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter", attn_implementation="eager").eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(merged - base).max() > 1e-3  # the adapter does something
    np.testing.assert_allclose(logits, merged, atol=1e-4)


def test_a_tokenizer_of_its_own_does_not_have_the_revision(trained, tiny_model, tmp_path):
    run = trained(f"model.tokenizer={tiny_model}")
    assert main(["export", str(run / "config.yaml"), "--merged", str(tmp_path / "merged")]) == 0
    assert load_tokenizer(tmp_path / "merged")(WORDS)["input_ids"] == load_tokenizer(tiny_model)(WORDS)["input_ids"]
    weights = load_model(tmp_path / "merged")
    assert weights.config == read_config(resolve_path("org/model", "v1"))


def test_a_revision_of_what_has_none_is_refused(capsys, config_file, tiny_model):
    with pytest.raises(UserError, match=r"jaxtune:nano is in the package; a revision \('v1'\) is for Hub ids"):
        resolve_path("jaxtune:nano", "v1")
    assert main(["train", str(config_file), "model.revision=v1", "--dry-run"]) == 2
    assert f"{tiny_model} is a directory; a revision ('v1') is for Hub ids" in capsys.readouterr().err
