"""What the documentation shows runs."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
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


def test_readme(data, tmp_path, monkeypatch):
    (code,) = python_blocks("README.md")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 12, "about ten lines from a model's path to an adapter"
    names: dict = {}
    shown = []
    monkeypatch.setattr("jaxtune.training.trainer.watched", shown.append)
    exec(smaller(code), names)
    assert names["result"].stopped == "finished"
    assert shown == ["train"], "a bar, where someone looks"
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


def public_classes() -> dict[str, type]:
    found = {}
    for module in (
        *("jaxtune", "jaxtune.config", "jaxtune.data", "jaxtune.evaluation", "jaxtune.models", "jaxtune.parallel"),
        *("jaxtune.search", "jaxtune.training", "jaxtune.updates", "jaxtune_kernels"),
        *("jaxtune_kernels.masked_update", "jaxtune_kernels.low_rank", "jaxtune_kernels.linear_cross_entropy"),
    ):
        home = importlib.import_module(module)
        for name in getattr(home, "__all__", None) or [name for name in vars(home) if not name.startswith("_")]:
            kind = getattr(home, name)
            if inspect.isclass(kind) and kind.__module__.startswith("jaxtune"):
                found[f"{kind.__module__}.{name}"] = kind
    return found


def test_every_field_of_a_public_record_says_what_it_is():
    lacking, seen = [], 0
    for place, kind in public_classes().items():
        fields = (
            [field.name for field in dataclasses.fields(kind)]
            if dataclasses.is_dataclass(kind)
            else getattr(kind, "_fields", [])
        )
        seen += len(fields)
        told = inspect.getdoc(kind) or ""
        lacking += [
            f"{place}.{field}"
            for field in fields
            if not re.search(rf"^ +(\w+, )*{field}(, \w+)*: \S", told, re.MULTILINE)
        ]
    assert seen > 80
    assert not lacking, "\n".join(lacking)
