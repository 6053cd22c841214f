"""The table of what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jaxtune.config.update_rules import Rule
from jaxtune.updates.treatments.base import Trained


def table_rows(rules: Sequence[Rule], trained: Iterable[Trained], base_size: int) -> list[dict[str, Any]]:
    """A row for each rule and kind of module, in the order of the rules, then the totals.

    Args:
      rules: all rules; those that freeze have no row.
      trained: what is trained.
      base_size: number of parameters of the base model.
    """
    parts = sorted(trained, key=lambda each: each.rule)
    added = sum(each.parameters for each in parts if each.added)
    everything = base_size + added

    def row(rule: str, match: str, method: str, module: str, layers: str, parameters: int) -> dict[str, Any]:
        share = f"{parameters / everything:.3%}"
        names = ("rule", "match", "method", "module", "layers", "parameters", "share")
        return dict(zip(names, (rule, match, method, module, layers, parameters, share), strict=True))

    rows = [
        row(
            f"update.{each.rule}",
            rules[each.rule].match,
            each.method,
            each.path,
            "" if each.layers is None else ranges(each.layers),
            each.parameters,
        )
        for each in parts
    ]
    rows.append(row("trained", "", "", "", "", sum(each.parameters for each in parts)))
    rows.append(row("all", "", "", "", "", everything))
    return rows


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs joined: ``0–3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("–".join(str(end) for end in run) for run in runs)
