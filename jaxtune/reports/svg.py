"""Scales, ticks and a framed plot as an SVG element tree.

Colours, fonts and line widths live in the page's style sheet (so that one drawing serves light, dark and print); here
is only geometry. ElementTree escapes every text and attribute.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from typing import Any

from jaxtune.reports import formatting
from jaxtune.reports.formatting import Number


def element(parent: ET.Element | None, tag: str, text: str | None = None, **attributes: Any) -> ET.Element:
    """A child element; ``class_`` becomes ``class``, ``data_trial`` ``data-trial``, and pixels keep one decimal."""
    written = {
        name.rstrip("_").replace("_", "-"): f"{value:.1f}".removesuffix(".0")
        if isinstance(value, float)
        else str(value)
        for name, value in attributes.items()
        if value is not None
    }
    node = ET.Element(tag, written) if parent is None else ET.SubElement(parent, tag, written)
    node.text = text
    return node


def to_text(node: ET.Element) -> str:
    """The element as markup that can stand inside HTML."""
    return ET.tostring(node, encoding="unicode", short_empty_elements=True)


def path(points: Iterable[tuple[Number, Number]], *, close: bool = False) -> str:
    """Path data through ``points`` (pixels)."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + ("Z" if close else "")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps values to pixels.

    Attributes:
      low, high: the data's bounds (of ``categories``: 0 and their number less one).
      start, end: the pixels they fall on.
      base: base of a logarithmic scale, None for a linear one.
      categories: the values of a scale without order.
      zero: the low end of a logarithmic scale stands for zero.
    """

    low: Number
    high: Number
    start: Number
    end: Number
    base: Number | None = None
    categories: tuple[str, ...] = ()
    zero: bool = False

    def __call__(self, value: Any) -> float:
        """The pixel of a value.

        Raises:
          ValueError: a value that is not among the categories.
        """
        if self.categories:
            number = float(self.categories.index(formatting.setting(value)))
            if len(self.categories) == 1:
                return (self.start + self.end) / 2
        else:
            number = float(value)
        low, high = self.low, self.high
        if self.base is not None:
            number = low if self.zero and number == 0 else number
            number, low, high = math.log(number), math.log(low), math.log(high)
        return self.start + (number - low) / (high - low) * (self.end - self.start)

    def over(self, start: Number, end: Number) -> Scale:
        """The same scale over other pixels."""
        return dataclasses.replace(self, start=start, end=end)

    def ticks(self, most: int = 6) -> list[tuple[Any, str]]:
        """About ``most`` round values with their labels."""
        if self.categories:
            return [(name, name) for name in self.categories]
        values = (
            _log_ticks(self.low, self.high, self.base, most) if self.base else _linear_ticks(self.low, self.high, most)
        )
        if self.zero:
            values = [0.0, *values[1:]]
        return [(value, formatting.number(value, 3)) for value in values]


def linear(values: Iterable[Number], *, margin: float = 0.05, lowest: float | None = None) -> Scale:
    """A linear scale around ``values`` (unit pixels; see :meth:`Scale.over`)."""
    present = list(values)
    low, high = min(present), max(present)
    gap = (high - low) * margin or abs(high) * 0.05 or 0.5
    low, high = low - gap, high + gap
    return Scale(low if lowest is None else max(low, lowest), high, 0.0, 1.0)


def logarithmic(values: Iterable[Number], *, base: float = 10.0, margin: float = 0.05) -> Scale:
    """A logarithmic scale around ``values``: positive ones, and perhaps zero, which stands a power below the others."""
    every = list(values)
    present = [value for value in every if value > 0]
    low, high = min(present), max(present)
    gap = (high / low) ** margin if high > low else 1.2
    # A range that nearly fills the floats must not be widened to zero or infinity.
    low, high = max(low / gap, sys.float_info.min), min(high * gap, sys.float_info.max)
    if len(present) == len(every):
        return Scale(low, high, 0.0, 1.0, base)
    # The power below the lowest one that is drawn, so that the first tick is that of zero.
    return Scale(base ** (math.ceil(math.log(low, base) - 1e-9) - 1), high, 0.0, 1.0, base, zero=True)


def for_scores(values: Iterable[Number]) -> Scale:
    """Linear, or logarithmic where positive scores spread over more than a factor of eight (some nearly diverged)."""
    present = list(values)
    if min(present) > 0 and max(present) / min(present) > 8:
        return logarithmic(present)
    return linear(present)


def _linear_ticks(low: Number, high: Number, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten (Heckbert, Nice numbers for graph labels, 1990)."""
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _log_ticks(low: Number, high: Number, base: Number, most: int) -> list[float]:
    """Powers of the base, thinned to ``most``; with 2 and 5 (or 3) between where few powers of ten lie in the range."""
    first = math.ceil(math.log(low, base) - 1e-9)
    last = math.floor(math.log(high, base) + 1e-9)
    powers = [float(base) ** exponent for exponent in range(first, last + 1)]
    if base == 10 and len(powers) < 3:
        for factors in ((1, 2, 5), (1, 3)):
            between = [factor * 10.0**exponent for exponent in range(first - 1, last + 1) for factor in factors]
            inside = [value for value in between if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]
            if 3 <= len(inside) <= most:
                return inside
        return _linear_ticks(low, high, most)
    return powers[:: max(1, math.ceil(len(powers) / most))]


def clip(text: str, length: int) -> str:
    """At most ``length`` characters, the middle left out: choices often differ in their ends alone."""
    if len(text) <= length:
        return text
    head = max(1, (length - 1) // 2)
    return f"{text[:head]}…{text[len(text) - max(1, length - 1 - head) :]}"


def percent_labels(ticks: list[tuple[Any, str]], percent: bool) -> list[tuple[Any, str]]:
    """Ticks of a share with their labels as percentages, if ``percent``; else unchanged."""
    return [(value, formatting.percentage(value)) for value, _ in ticks] if percent else ticks


MARK_SIZE = 5.0
CHARACTER = 7.0  # width of a label's character in pixels, a little generous


def mark(
    parent: ET.Element, x: float, y: float, status: str, *, trial: int, reference: bool = False, winner: bool = False
) -> ET.Element:
    """A trial's mark; the shape tells the status without colour, the reference has a ring and the winner the accent."""
    kind = f"mark {status}{' winner' if winner else ''}"
    group = element(parent, "g", class_=kind, data_trial=trial, transform=f"translate({x:.1f},{y:.1f})")
    size = MARK_SIZE
    if reference:
        element(group, "circle", class_="ring", r=size + 4)
    if status == "failed":
        element(group, "path", d=f"M{-size},{-size}L{size},{size}M{-size},{size}L{size},{-size}")
    elif status == "promoted":
        element(group, "path", d=f"M0,{-size - 1.5}L{size + 1.5},0L0,{size + 1.5}L{-size - 1.5},0Z")
    elif status == "running":
        element(group, "rect", x=-size + 0.5, y=-size + 0.5, width=2 * size - 1, height=2 * size - 1)
    else:
        element(group, "circle", r=size if status == "finished" else size - 0.8)
    return group


class Plot:
    """A framed drawing: an SVG root with axes; marks are added to :attr:`root`.

    Attributes:
      root: the ``svg`` element.
      x, y: the scales, in pixels.
      left, right, top, bottom: the frame's edges.
    """

    def __init__(
        self,
        size: tuple[int, int],
        x: Scale,
        y: Scale,
        *,
        label: str,
        x_label: str = "",
        y_label: str = "",
        margins: tuple[int, int, int, int] = (26, 16, 44, 58),
        ticks: tuple[int, int] = (8, 5),
        integer_x: bool = False,
        percent_x: bool = False,
        percent_y: bool = False,
        interactive: bool = True,
    ):
        """Args:

        size: width and height in pixels.
        x, y: scales; y grows upwards.
        label: what the drawing shows, for screen readers.
        x_label, y_label: axis titles.
        margins: top, right, bottom, left.
        ticks: about how many, on x and y.
        integer_x: x counts something; ticks between whole numbers are left out.
        percent_x, percent_y: ticks are shares, written as percentages.
        interactive: trials can be walked through with the arrow keys.
        """
        width, height = size
        top, right, bottom, left = margins
        self.left, self.right, self.top, self.bottom = (
            float(left),
            float(width - right),
            float(top),
            float(height - bottom),
        )
        self.x = x.over(self.left, self.right)
        self.y = y.over(self.bottom, self.top)
        self.root = svg_root(size, label, role="application" if interactive else "img")
        axes = element(self.root, "g", class_="axes", aria_hidden="true")
        for value, text in percent_labels(self.y.ticks(ticks[1]), percent_y):
            at = self.y(value)
            element(axes, "line", class_="grid", x1=self.left, x2=self.right, y1=at, y2=at)
            element(axes, "text", text, x=self.left - 8, y=at + 4, text_anchor="end")
        for value, text in percent_labels(self.x.ticks(ticks[0]), percent_x):
            if integer_x and value != int(value):
                continue
            at = self.x(value)
            element(axes, "line", class_="tick", x1=at, x2=at, y1=self.bottom, y2=self.bottom + 5)
            room = int((self.right - self.left) / max(len(self.x.categories), 1) / CHARACTER)
            shown = clip(text, room) if self.x.categories else text
            element(axes, "text", shown, x=at, y=self.bottom + 18, text_anchor="middle")
        element(axes, "line", class_="axis", x1=self.left, x2=self.right, y1=self.bottom, y2=self.bottom)
        if x_label:
            element(axes, "text", x_label, class_="title", x=self.right, y=height - 6, text_anchor="end")
        if y_label:
            element(axes, "text", y_label, class_="title", x=0, y=14)

    def polyline(self, points: Sequence[tuple[Any, Any]], class_: str, trial: int | None = None) -> ET.Element:
        """A line through data points (see :func:`line`)."""
        data = path((self.x(x), self.y(y)) for x, y in points)
        return line(self.root, data, class_, trial)


def svg_root(size: tuple[int, int], label: str, *, role: str = "img") -> ET.Element:
    """An ``svg`` element that scales with the page.

    Args:
      size: width and height of its coordinates.
      label: what it shows, for screen readers.
      role: "img" for a still drawing; "application" for one whose trials the arrow keys walk through; "group" for one
        that holds controls of its own.
    """
    root = element(None, "svg", viewBox=f"0 0 {size[0]} {size[1]}", role=role, aria_label=label, class_="plot")
    if role == "application":
        root.set("aria-roledescription", "figure, arrow keys step through the trials")
        root.set("tabindex", "0")
        root.set("data-walk", "")
    return root


def line(parent: ET.Element, data: str, class_: str, trial: int | None = None) -> ET.Element:
    """A path; one that belongs to a trial gets a wide invisible twin that is easy to point at."""
    group = element(parent, "g", class_=class_, data_trial=trial)
    if trial is not None:
        element(group, "path", class_="hit", d=data)
    element(group, "path", class_="stroke", d=data)
    return group
