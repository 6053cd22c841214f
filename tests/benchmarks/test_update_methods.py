"""What the costs of update methods are counted from: the files, traces, a compiler's report, and the tables."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import method_cases
import pytest
import update_methods
from method_cases import CASES, counted, methods, product_flops, shaped
from method_tables import tables

from jaxtune.updates import treatments
from jaxtune.updates.treatments.low_rank import RankRule


def test_every_method_has_a_file_and_all_have_one_lever():
    found = methods()
    assert {name for name, treatment in treatments.own().items() if treatment.trains} <= found.keys()
    assert next(iter(found)) == "low_rank"
    rules = [rule for method in found.values() for rule in method.rules]
    assert {rule.rank for rule in rules if isinstance(rule, RankRule)} == {method_cases.RANK}
    assert {getattr(rule, "dropout", 0.0) for rule in rules} == {0.0}


def test_products_count_as_often_as_they_run():
    def program(x, w):
        def layer(carry, _):
            return jnp.tanh(carry @ w), None

        x, _ = jax.lax.scan(layer, x, None, length=3)
        x = jax.lax.cond(x[0, 0] > 0, lambda y: y @ w @ w, lambda y: y @ w, x)
        blocks = jnp.int32(x[0, 0])  # Not known before, as in the loss.
        return jax.lax.fori_loop(
            0, blocks, lambda i, y: y + jnp.sum(jax.lax.dynamic_slice(x, (i * 4, 0), (4, 8)) @ w), 0.0
        )

    traced = jax.jit(program).trace(jnp.zeros((32, 8)), jnp.zeros((8, 8))).jaxpr
    each = 2 * 32 * 8 * 8
    assert product_flops(traced, rows=32) == each * (3 + 2 + 1)
    assert product_flops(traced, rows=32, taken=0.25) == each * (3 + 1.25 + 1)


def test_a_step_is_counted_from_its_trace():
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2}
    model = dataclasses.replace(CASES["8b-h200"].model, **small, num_heads=2, num_kv_heads=1, head_dim=8, windows=())
    case = dataclasses.replace(CASES["8b-h200"], model=model, rows=2, length=32)
    lora = counted(methods()["low_rank"], case, "dots")
    widths = [16 + 16, 16 + 8, 16 + 8, 16 + 16, 16 + 32, 16 + 32, 32 + 16]
    assert lora["trained_parameters"] == 2 * method_cases.RANK * sum(widths)
    # Two moments of four bytes, and how many steps each stack has seen.
    assert 0 <= lora["optimizer_bytes"] - 8 * lora["trained_parameters"] < 1024
    assert not lora["biases"]
    assert shaped(methods()["bitfit"], model) == dataclasses.replace(model, qkv_bias=True)


def test_a_report_of_the_compiler_is_read_once_all_of_it_is_there(tmp_path):
    stem = "module_0000.jit_step.cl_1.after_optimizations"
    (tmp_path / f"{stem}-memory-usage-report.txt").write_text("Memory Space: default\nTotal bytes: 1000 (1000B)\n")
    (tmp_path / f"{stem}-buffer-assignment.txt").write_text(
        "allocation 0: size 7, page 0, thread-local:\n"
        "allocation 1: size 300, page 0, parameter 8, shape |bf16[3,50]| at ShapeIndex {}:\n value: <1> (size=300)\n"
        "allocation 2: size 100, page 0, parameter 9, shape |f32[25]| at ShapeIndex {}, maybe-live-out:\n"
        "allocation 3: size 600, page 0, preallocated-temp:\n"
    )
    assert method_cases._reported(tmp_path) is None
    (tmp_path / f"{stem}_after_buffer_assignment.txt").write_text("HloModule")
    assert method_cases._reported(tmp_path) == {"arguments": 400, "temporaries": 600, "peak": 1000}


def test_rows_are_kept_and_measured_once(tmp_path, capsys, monkeypatch):
    asked = []

    def fake(name, case, remat, seconds):
        asked.append((name, case))
        size = {"arguments": 2**30, "temporaries": 2**29, "peak": 3 * 2**29}
        return size if name == "low_rank" else {"peak": 20 * 2**30, "limit": 16 * 2**30}

    count = {"share": 0.01, "optimizer_bytes": 2**20, "traced_flops": 1e12, "biases": False}
    side = {"tokens_per_second": 1000.0, "ratio": 1.25}
    speed = {"jaxtune": {"none": side, "dots": side}, "peft": {**side, "ratio": 1.3}}
    monkeypatch.setattr(update_methods, "compiled", fake)
    monkeypatch.setattr(update_methods, "counted", lambda *_: count)
    monkeypatch.setattr(update_methods.method_speed, "measured", lambda *_: speed)
    command = ["counts", "memory", "speed", "--methods", "low_rank,full", f"--results={tmp_path / 'found.json'}"]
    assert update_methods.main(command) == 0
    assert len(asked) == 2 * len(CASES)
    text = capsys.readouterr().out
    assert "no fit" in text
    assert "met" in text
    assert max(map(len, text.splitlines())) <= 110
    assert update_methods.main([*command, "--json"]) == 0
    assert len(asked) == 2 * len(CASES)
    report = json.loads(capsys.readouterr().out)
    assert tables(report) == text.rstrip("\n")
    with pytest.raises(SystemExit):
        update_methods.main(["--methods=low_rnk", *command[:1]])
    assert "low_rank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        update_methods.main([*command, "--remat=full"])
    assert "was measured with" in capsys.readouterr().err
