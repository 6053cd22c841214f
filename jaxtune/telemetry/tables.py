"""What stands in tables, and tables of HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any


def html_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """Rows as a table for a result's ``_repr_html_``; every text is escaped.

    Args:
      rows: of the same keys, which head the columns.
      title: stands above the table.
    """
    caption = f"<caption>{html.escape(title)}</caption>" if title else ""
    if not rows:
        return f"<table>{caption}</table>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell(value))}</td>' for value in row.values())}</tr>" for row in rows
    )
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def cell(value: Any) -> str:
    """A value as it stands in a table: four digits of a number, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
