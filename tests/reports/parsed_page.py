"""A report, parsed for assertions."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from jaxtune.reports import write_report

VOID = {"meta", "br", "img", "input", "link", "wbr", "hr"}


class Page(HTMLParser):
    """A parsed page; parsing fails where a tag is left open or closed twice.

    Attributes:
      elements: (tag, attributes) in order.
      text: all visible text, whitespace collapsed.
      tables: each table as rows of cell texts.
      scripts: the text of each script element.
    """

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self._parts: list[str] = []
        self._cell: list[str] | None = None
        self.feed(html)
        self.close()
        assert not self._open, f"elements left open: {self._open}"
        self.text = " ".join("".join(self._parts).replace("\u00a0", " ").split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "script":
            self.scripts.append("")
        elif tag in ("p", "h1", "h2", "h3", "dt", "dd", "div", "li"):
            self._parts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"{tag} is closed but not open"
        assert self._open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).replace("\u00a0", " ").split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts[-1] += data
        elif "style" not in self._open:
            self._parts.append(data)
            if self._cell is not None:
                self._cell.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Attributes of every element of a tag that has the given attributes."""
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]

    def cards(self) -> dict[str, Any]:
        """The trials' data that the script reads."""
        return json.loads(self.scripts[0])


def open_report(directory: Path) -> Page:
    """Writes a study's report and parses it."""
    return Page(write_report(directory).read_text(encoding="utf-8"))
