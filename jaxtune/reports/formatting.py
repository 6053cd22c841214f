"""How numbers are written for people: few digits, no noise, one way per quantity."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from jaxtune.config.metrics import COSTS, METRICS
from jaxtune.search.conditions import says_kind

Number = int | float

MINUS = "−"
SPACE = "\u00a0"  # a number stays on one line with its unit
ABSENT = "–"


_KNOWN = {**METRICS, **COSTS}


def is_share(metric: str) -> bool:
    """Whether a metric lies in [0, 1] and is read as a percentage."""
    return metric in _KNOWN and _KNOWN[metric].is_share


def metric_name(metric: str) -> str:
    """An objective's name in words."""
    return _KNOWN[metric].label if metric in _KNOWN else metric.replace("_", " ")


def finite(value: Any) -> float | None:
    """``value`` as a float, or None if it is no finite number (a diverged trial's score, a missing key)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Number | None, digits: int = 4) -> str:
    """A number to ``digits`` significant digits; very small and very large ones with an exponent (``3.2e-5``)."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else f"{MINUS}∞")
    if value == 0:
        return "0"
    if not 1e-2 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS, 1 if value < 0 else 0)
    if float(value).is_integer():
        return f"{int(value):,}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-", MINUS)


def score(value: Number | None, metric: str) -> str:
    """A score with the same number of digits in every row: four decimals, or per cent with one."""
    if value is None:
        return ABSENT
    if is_share(metric):
        return f"{100 * value:.1f}{SPACE}%".replace("-", MINUS)
    return (f"{value:.4f}" if abs(value) < 1000 else number(value)).replace("-", MINUS)


def difference(value: Number | None, metric: str) -> str:
    """A signed difference of two scores, in points for shares."""
    if value is None:
        return ABSENT
    sign = "+" if value > 0 else (MINUS if value < 0 else "±")
    return f"{sign}{100 * abs(value):.1f}{SPACE}points" if is_share(metric) else f"{sign}{abs(value):.4f}"


def percentage(share: Number) -> str:
    """A share as a percentage without useless decimals: ``20 %``, ``12.5 %``."""
    return f"{number(100 * share, 3)}{SPACE}%"


def seconds(value: Number | None) -> str:
    """A duration: ``8.2 s``, ``5 min 12 s``, ``3 h 04 min``."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.1f}{SPACE}s" if value < 10 else f"{value:.0f}{SPACE}s"
    total = round(value)
    if total < 3600:
        return f"{total // 60}{SPACE}min {total % 60:02d}{SPACE}s"
    return f"{total // 3600}{SPACE}h {total % 3600 // 60:02d}{SPACE}min"


def age(value: Number) -> str:
    """How long ago something was, in the two largest units; where a clock was set back, no time at all."""
    rest = round(max(0.0, value))
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if rest >= size:
            return f"{rest // size}{SPACE}{unit} {rest % size // below}{SPACE}{smaller}"
    return f"{rest}{SPACE}s"


def roughly(value: Number) -> str:
    """An estimated duration, no more exact than it is: ``less than a minute``, ``12 min``, ``3 h 20 min``."""
    if value < 50:
        return "less than a minute"
    minutes = max(1, round(value / 60))
    if minutes < 60:
        return f"{minutes}{SPACE}min"
    minutes = round(minutes, -1)
    return f"{minutes // 60}{SPACE}h" + (f"{SPACE}{minutes % 60:02d}{SPACE}min" if minutes % 60 else "")


def clock(value: Number) -> str:
    """A time (seconds since the epoch) in the local zone: ``2025-03-01 14:05:09``."""
    return datetime.datetime.fromtimestamp(value).isoformat(sep=" ", timespec="seconds")


def setting(value: Any) -> str:
    """A configuration value as shown in tables and tooltips (the command line keeps the exact one)."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return number(value, 3)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {setting(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(setting(item) for item in value)
    return str(value)


def setting_of(configuration: Mapping[str, Any], key: str) -> str:
    """A trial's value of a key; absent where the key does not apply to it."""
    if key not in configuration and says_kind(configuration, key):
        return ABSENT
    return setting(configuration.get(key))


def count(amount: int, singular: str, plural: str | None = None) -> str:
    """``1 trial``, ``12 trials``."""
    return f"{amount:,} {singular if amount == 1 else plural or singular + 's'}"
