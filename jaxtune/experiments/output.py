"""What an experiment leaves: ``summary.json``, figures and a page, in ``docs/experiments/<study>-<name>/``."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtune.config import Config
from jaxtune.experiments.drawing import standalone
from jaxtune.files import write_atomically
from jaxtune.layout import SUMMARY_FILE
from jaxtune.reports.formatting import ABSENT
from jaxtune.search.journal import plain


def output_directory(config: Config, study: str) -> Path:
    """The folder of an experiment's results: ``study.output``, or ``docs/experiments/<study>-<name>``."""
    return Path(config.study.output or f"docs/experiments/{study}-{config.name}")


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of text under the keys of all of them, numbers to the right; a row may lack keys (a reference's values)."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, ABSENT) for name in header} for row in rows]
    numeric = [all(_like_a_number(row[name]) for row in rows) for name in header]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    lines += ["| " + " | ".join(row[name].replace("|", "\\|") for name in header) + " |" for row in rows]
    return "\n".join(lines)


def _like_a_number(text: str) -> bool:
    return not any(character.isalpha() for character in text)


@runtime_checkable
class Page(Protocol):
    """What an experiment's page module makes of its summary."""

    @staticmethod
    def title(summary: Mapping[str, Any]) -> str:
        """The page's title."""
        ...

    @staticmethod
    def text(summary: Mapping[str, Any]) -> Sequence[str]:
        """Its paragraphs, tables and figures, as Markdown."""
        ...

    @staticmethod
    def figures(summary: Mapping[str, Any]) -> Mapping[str, ET.Element]:
        """Its drawings by file name without ``.svg``."""
        ...


def publish(config: Config, study: str, summary: Mapping[str, Any], page: Page) -> dict[str, Any]:
    """Writes an experiment's folder from its summary; see :func:`write_output`."""
    return write_output(
        output_directory(config, study),
        summary,
        title=page.title(summary),
        text=page.text(summary),
        figures=page.figures(summary),
    )


def write_output(
    directory: Path,
    summary: Mapping[str, Any],
    *,
    title: str,
    text: Sequence[str],
    figures: Mapping[str, ET.Element] | None = None,
) -> dict[str, Any]:
    """Writes an experiment's folder; each file appears as a whole, ``summary.json`` last.

    Args:
      directory: the folder, made if it is missing.
      summary: for programs; ``command`` (what made it), ``machine`` (of :func:`jaxtune.telemetry.environment.machine`)
        and ``budget`` (steps_run, seconds, compilations) are shown on the page as well.
      title: of the page.
      text: the page's paragraphs, tables and figures (``![…](name.svg)``), as Markdown.
      figures: file name without ``.svg`` -> drawing.

    Returns:
      The summary as it was written: numbers that are not finite are null.

    Raises:
      OSError: a file cannot be written; those written before stay.
    """
    written = plain(summary)
    for name, drawing in (figures or {}).items():
        write_atomically(directory / f"{name}.svg", standalone(drawing))
    page = [f"# {title}", *text, *_provenance(written)]
    write_atomically(directory / "README.md", "\n\n".join(page) + "\n")
    contents = json.dumps(written, indent=2, allow_nan=False, ensure_ascii=False)
    write_atomically(directory / SUMMARY_FILE, contents + "\n")
    return written


def _provenance(summary: Mapping[str, Any]) -> list[str]:
    """The end of a page: the command, the effort, the machine, the versions."""
    machine, budget = summary["machine"], summary["budget"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return [
        "## How it was made",
        f"```\n{summary['command']}\n```",
        f"{budget['steps_run']:,} optimizer steps, {budget['seconds']:,.0f} s of training and scoring, train step "
        f"compiled {budget['compilations']} times. {machine['cores']} cores of {machine['processor']}, device "
        f"{machine['device']}; Python {machine['python']}, {versions}. All numbers are in "
        f"[{SUMMARY_FILE}]({SUMMARY_FILE}).",
    ]
