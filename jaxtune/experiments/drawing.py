"""What figures of experiments share: a style for drawings that stand alone, whiskers, legends, numbers with bounds."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from importlib.resources import files

from jaxtune.reports import formatting, svg

_PADDING = 12

# Beside the palette of the report's page: what a figure that stands alone needs.
_STYLE = """
svg { background: var(--paper); }
text { font: 12px var(--sans); fill: var(--muted); }
.title { font-weight: 500; }
.name { font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--faint); }
.axis, .tick { stroke: var(--rule); }
.guide { stroke: var(--muted); stroke-dasharray: 4 4; fill: none; }
.stroke { fill: none; stroke: var(--colour, var(--accent)); stroke-width: 2; stroke-linejoin: round; }
.thin .stroke { stroke-width: 1.2; stroke-opacity: 0.8; }
.dashed .stroke { stroke-dasharray: 6 4; }
.whisker { stroke: var(--colour, var(--accent)); stroke-width: 1.6; }
.band { fill: var(--colour, var(--accent)); fill-opacity: 0.16; }
.dot { fill: var(--colour, var(--accent)); }
.ring { fill: var(--paper); stroke: var(--colour, var(--accent)); stroke-width: 2; }
.first { --colour: var(--accent); }
.second { --colour: var(--finished); }
.third { --colour: var(--promoted); }
.fourth { --colour: var(--failed); }
.quiet { --colour: var(--scored); }
"""


def standalone(drawing: ET.Element) -> str:
    """A drawing (:mod:`jaxtune.reports.svg`) as a file of its own, light or dark as its reader prefers.

    It brings the report's palette and a background, so it reads on any page.
    """
    css = files("jaxtune.reports").joinpath("templates/report.css").read_text(encoding="utf-8")
    palette = css[: css.index("* { box-sizing")]
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **drawing.attrib})
    width, height = (int(size) + 2 * _PADDING for size in drawing.attrib["viewBox"].split()[2:])
    root.attrib |= {
        "viewBox": f"{-_PADDING} {-_PADDING} {width} {height}", "width": str(width), "height": str(height)
    }  # fmt: skip
    ET.SubElement(root, "style").text = palette + _STYLE
    svg.element(root, "rect", x=-_PADDING, y=-_PADDING, width=width, height=height, style="fill: var(--paper)")
    root.extend(drawing)
    return ET.tostring(root, encoding="unicode") + "\n"


def fixed(value: float, digits: int, *, signed: bool = False) -> str:
    """A number with so many decimals."""
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", formatting.MINUS)


def bounded(
    value: float | None, low: float | None, high: float | None, digits: int = 2, *, signed: bool = False
) -> str:
    """A figure with its interval: ``0.83 [0.61, 0.94]``; a missing upper end stands for infinity."""
    text = formatting.ABSENT if value is None else fixed(value, digits, signed=signed)
    if low is None:
        return text
    top = "∞" if high is None else fixed(high, digits, signed=signed)
    return f"{text} [{fixed(low, digits, signed=signed)}, {top}]"


def legend(parent: ET.Element, text: str, colour: str, x: float, y: float) -> None:
    """A dot of a colour with its meaning."""
    group = svg.element(parent, "g", class_=colour)
    svg.element(group, "circle", class_="dot", cx=x, cy=y - 4, r=4)
    svg.element(group, "text", text, class_="name", x=x + 12, y=y)


def whisker(parent: ET.Element, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An interval as a line between two points (pixels)."""
    svg.element(parent, "line", class_="whisker", x1=start[0], y1=start[1], x2=end[0], y2=end[1])
