"""The tables of ``update_methods.py``, narrow enough for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

REFERENCE = "low_rank"


def tables(report: dict[str, Any]) -> str:
    """All tables of what has been measured."""
    found = [_memory(report, model) for model in ("8b", "0.6b")]
    if "speed" in report:
        found.append(_speed(report["speed"]["rows"]))
    return "\n\n".join(table for table in found if table)


def _memory(report: dict[str, Any], model: str) -> str:
    """What is trained of a model, and what its step needs and computes."""
    counts = _of(report.get("counts", {}).get("rows", {}), model)
    memory = report.get("memory", {}).get("rows", {})
    cases = [case for case in _cases(memory) if case.startswith(f"{model}-")]
    if not counts:
        return ""
    lora = counts.get(REFERENCE)
    header = ["method", "trained", "optimizer MiB", "× FLOPs"]
    for case in cases:
        header += [case.removeprefix(f"{model}-"), "temp", "peak GiB"]
    lines = [header]
    for name, row in counts.items():
        cells = [
            name + ("*" if row["biases"] else ""),
            f"{row['share']:.3%}",
            f"{row['optimizer_bytes'] / 2**20:,.1f}",
            f"{row['traced_flops'] / lora['traced_flops']:.2f}" if lora else "–",
        ]
        for case in cases:
            cells += _bytes(memory.get(f"{case}/{name}"))
        lines.append(cells)
    title = (
        f"{model}: a step with remat {report['counts']['setting']['remat']}; arguments, temporaries, peak of a device"
    )
    note = ["* on the same shape with biases of q, k and v"] if any(row["biases"] for row in counts.values()) else []
    return "\n".join([title, _aligned(lines), *note])


def _bytes(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["–"] * 3
    if "limit" in row:
        return ["", "no fit", f"{row['peak'] / 2**30:.2f}"]
    return [f"{row[key] / 2**30:.2f}" for key in ("arguments", "temporaries", "peak")]


def _speed(rows: dict[str, Any]) -> str:
    lines = [["method", "tokens/s", "× LoRA", "× LoRA, dots", "PEFT tokens/s", "× its LoRA", "goal"]]
    for name, row in rows.items():
        ours, dots, theirs = row["jaxtune"]["none"], row["jaxtune"]["dots"], row["peft"]
        cells = [name, f"{ours['tokens_per_second']:,.0f}", f"{ours['ratio']:.2f}", f"{dots['ratio']:.2f}"]
        if theirs is None:
            cells += ["–", "–", "–"]
        else:
            met = "met" if ours["ratio"] <= theirs["ratio"] else "missed"
            cells += [f"{theirs['tokens_per_second']:,.0f}", f"{theirs['ratio']:.2f}", met]
        lines.append(cells)
    title = "seconds of a step over LoRA's of the same side, on this machine; the goal is at most PEFT's ratio"
    return "\n".join([title, _aligned(lines)])


def _of(rows: dict[str, Any], case: str) -> dict[str, Any]:
    return {key.partition("/")[2]: row for key, row in rows.items() if key.partition("/")[0] == case}


def _cases(rows: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key.partition("/")[0] for key in rows))


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(each)
        ).rstrip()
        for each in (list(zip(line, widths, strict=True)) for line in lines)
    )
