"""What the documentation shows runs."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.models import split

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
        (r"\(16, 513\)", "(2, 33)"),
        (r"\b(100 ==|step == 500)", lambda found: found[0].replace("100", "2").replace("500", "2")),
        (r"max_new_tokens=\d+", "max_new_tokens=4"),
        (r"\(\)\]\] \* 16", "()]] * 2"),
    ):
        code = re.sub(pattern, replacement, code)
    return code


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)


def write_rows(folder):
    lines = [json.dumps({"question": f"what is {index}?", "answer": f"it is {index}"}) for index in range(8)]
    for name in ("rows", "train", "dev"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


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


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The blocks of docs/python.md, and the names after the first of them."""
    folder = tmp_path_factory.mktemp("page")
    with contextlib.chdir(folder):
        write_rows(folder)
        first, *others = (smaller(code) for code in python_blocks("docs/python.md"))
        names: dict = {}
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(first, names)
        assert names["result"].evaluation["validation_loss"] == pytest.approx(float(output.getvalue()))
        yield {re.search(r"^(?:def|for) (\w+)", code, flags=re.MULTILINE)[1]: code for code in others[:-1]}, names


def log_probs(names, batch, **adapters):
    logits = np.asarray(names["model"](batch["tokens"], batch["positions"], batch["segment_ids"], **adapters), "f8")
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return np.take_along_axis(logs, batch["targets"][..., None], axis=-1)[..., 0]


def test_python_page_s_loops(page, capsys):
    code, names = page
    exec(code["batch"], names)
    assert int(names["state"].step) == 2
    exec(code["rows_from_anywhere"], names)
    assert int(names["state"].step) == 2
    printed = capsys.readouterr()
    assert "my loop  step 2/500  loss " in printed.err
    assert len(ast.literal_eval(printed.out)) == 1
    # Killed and begun again, it goes on from its checkpoint.
    loaded = jaxtune.load_checkpoint("checkpoints", names["trainer"].abstract_state(), "latest")
    assert loaded is not None
    assert loaded[0] == 2
    trained = names["state"].trainable
    jax.tree.map(np.testing.assert_array_equal, loaded[1].trainable, trained)


def test_python_page_s_objective(page):
    code, names = page
    exec(code["focal"], names)
    trainer, batch = (
        names["trainer"],
        jaxtune.evaluation_batches(names["dev"], batch_size=2, sequence_length=32, packing=True)[0],
    )
    log_p = log_probs(names, batch)
    result = trainer.evaluate(trainer.init(), [batch])
    expected = np.average(-((1 - np.exp(log_p)) ** 2) * log_p, weights=batch["weights"])
    assert result.loss == pytest.approx(expected, rel=1e-4)
    assert result.metrics["sure"] == pytest.approx(np.average(np.exp(log_p) > 0.9, weights=batch["weights"]))


class Given:
    """A model whose log-probabilities, or logits, are given."""

    def __init__(self, values, reference=None):
        self.values, self.reference, self.head = values, reference, self

    def __call__(self, *_):
        return jnp.asarray(self.values, jnp.float32)

    hidden = __call__

    def losses(self, hidden, targets, weights):
        return -hidden


def test_python_page_s_preferences(page):
    code, names = page
    exec(code["dpo"], names)
    result = names["result"]
    assert result.metrics.keys() >= {"margin", "accuracy"}
    assert result.metrics["loss"] < math.log(2)  # what it begins at
    batch = names["pair_rows"](names["pairs"][:1], 32)
    prompt, chosen, rejected = names["pairs"][0]
    lengths = [len(prompt) + len(answer) - 1 for answer in (chosen, rejected)]
    assert [np.count_nonzero(batch["segment_ids"][0] == segment) for segment in (1, 2)] == lengths
    for segment, answer in enumerate((chosen, rejected), 1):
        learnt = (batch["segment_ids"][0] == segment) & (batch["weights"][0] > 0)
        assert batch["targets"][0][learnt].tolist() == answer
    # The sums of log-probabilities and what TRL 1.16's DPOTrainer made of them (loss_type sigmoid, beta 0.1).
    policy = [-17.9850712, -3.43638682, -11.6683292, -7.47212744, -18.2737198, -14.3643064, -16.4874763, -22.6555634]
    start = [-16.5259933, -3.62673688, -13.0218754, -6.4170928, -21.7225685, -13.787035, -17.1834965, -23.9741688]
    policy, start = (np.reshape(sums, (2, 4)).T for sums in (policy, start))
    sides = {"segment_ids": np.array([[1, 2]] * 4), "weights": np.ones((4, 2))}
    batch = {**sides, "tokens": None, "positions": None, "targets": None}
    terms = names["dpo"](Given(policy, Given(start)), batch, {})
    assert float(terms.losses.mean()) == pytest.approx(0.775881171, rel=1e-6)
    assert float(terms.metrics["margin"][0].mean()) == pytest.approx(-0.146410465, rel=1e-5)
    assert float(terms.metrics["accuracy"][0].mean()) == 0.5


def test_python_page_s_adapters(page, capsys):
    code, names = page
    generator = np.random.default_rng(0)
    plan = jaxtune.UpdatePlan([jaxtune.LowRankRule(match="layers.*.attention.q", rank=2)]).resolve(names["model"])
    shapes = jax.eval_shape(plan.init, jax.random.key(0), split(names["model"])[1])
    for folder in ("support", "legal"):
        arrays = jax.tree.map(lambda leaf: jnp.asarray(generator.standard_normal(leaf.shape), jnp.float32), shapes)
        jaxtune.save_adapter(f"runs/{folder}/adapter", plan, arrays, {}, names["model"], "base")
    exec(code["chosen"], names)
    support, legal, each = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert each[:2] == [support[0], legal[1]]
    assert support != legal
    assert Path("both", "adapter_model.safetensors").exists()


def test_python_page_s_distillation(page, capsys):
    code, names = page
    exec(code["taught"], names)
    # Student and teacher are one model here, and B is zero at the start.
    assert abs(names["result"].metrics["loss"]) < 0.1
    assert float(capsys.readouterr().out) > 0.8
    generator = np.random.default_rng(0)
    ours, theirs = generator.standard_normal((2, 2, 3, 7))
    batch = {"teacher": jnp.asarray(theirs, jnp.float32), "weights": np.ones((2, 3))}
    batch |= dict.fromkeys(("tokens", "positions", "segment_ids"))
    terms = names["distill"](Given(ours), batch, {})
    p, q = (np.exp(each / 2) / np.exp(each / 2).sum(axis=-1, keepdims=True) for each in (theirs, ours))
    np.testing.assert_allclose(terms.losses, 4 * (p * np.log(p / q)).sum(axis=-1), rtol=1e-4)


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
