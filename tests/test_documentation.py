"""What the documentation shows runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def python_blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


def smaller(code: str) -> str:
    """The same code over fewer steps and shorter rows, with the model inside the package and on one device."""
    for pattern, replacement in (
        (r"steps=\d+", "steps=2"),
        (r"(256|512)\b", "32"),
        (r"batch_size=\d+", "batch_size=2"),
        (r"evaluate_every=\d+", "evaluate_every=2"),
        (r'"meta-llama/[^"]+", jaxtune.make_mesh\(.*?\)\)', '"jaxtune:nano")'),
        (r"meta-llama/[^\"]+", "jaxtune:nano"),
        (r"int\(state.step\) == \d+", "int(state.step) == 2"),
    ):
        code = re.sub(pattern, replacement, code)
    return code


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"question": f"what is {index}?", "answer": f"it is {index}"}) for index in range(8)]
    for name in ("rows", "train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def test_readme(data, tmp_path):
    (code,) = python_blocks("README.md")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 12, "about ten lines from a model's path to an adapter"
    names: dict = {}
    exec(smaller(code), names)
    assert names["result"].stopped == "finished"
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_python_page(data, capsys):
    fit, loop, objective, *_ = (smaller(code) for code in python_blocks("docs/python.md"))
    names: dict = {}
    exec(fit, names)
    assert names["result"].evaluation["validation_loss"] == pytest.approx(float(capsys.readouterr().out))
    # The loop goes over batches of its own.
    exec("batches = jaxtune.train_batches(train, batch_size=2, sequence_length=32, seed=0, packing=True)", names)
    exec(loop, names)
    assert int(names["state"].step) == 2
    exec(objective, names)
    trainer, batch = names["trainer"], next(names["batches"])
    logits = np.asarray(names["model"](batch["tokens"], batch["positions"], batch["segment_ids"]), np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    log_p = np.take_along_axis(logs, batch["targets"][..., None], axis=-1)[..., 0]
    expected = np.average(-((1 - np.exp(log_p)) ** 2) * log_p, weights=batch["weights"])
    result = trainer.evaluate(trainer.init(), [batch])
    assert result.loss == pytest.approx(expected, rel=1e-4)
    assert result.metrics["sure"] == pytest.approx(np.average(np.exp(log_p) > 0.9, weights=batch["weights"]))


@pytest.mark.parametrize("example", range(4), ids=["layout", "low_rank", "masked_update", "linear_cross_entropy"])
def test_kernels_page(example):
    code = python_blocks("kernels/README.md")
    assert len(code) == 4
    exec(code[example], {"__name__": "example"})  # each asserts what it claims
