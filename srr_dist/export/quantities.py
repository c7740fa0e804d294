"""Numbers of a report as people read them; a missing number reads "–", and a unit never leaves its number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

MISSING = "–"
NBSP = "\u00a0"


def finite(value: object) -> float | None:
    """The value if it is a finite number; None for null, NaN, infinities and whatever is no number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def number(values: Mapping[str, Any], key: str) -> float | None:
    """The finite number under ``key``; None where there is none."""
    return finite(values.get(key))


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient; None where a part is missing or the denominator is not positive."""
    return numerator / denominator if numerator is not None and denominator is not None and denominator > 0 else None


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are there."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def plain(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent between 1e-4 and 1e6, no trailing zeros: ``0.0123``, ``29.2``, ``32``."""
    if value is None:
        return MISSING
    text = _significant(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def percent(value: float | None, digits: int = 3) -> str:
    """A share in per cent: ``1.20 %``."""
    return MISSING if value is None else f"{_significant(100 * value, digits)}{NBSP}%"


def count(value: float | None) -> str:
    """A number of things with a decimal prefix: ``106 M``."""
    return MISSING if value is None else _scaled(value, 1000, ("", "k", "M", "G", "T")).rstrip()


def counted(things: int, noun: str) -> str:
    """How many of a thing: ``1 layer``, ``210 layers``."""
    return f"{things:,} {noun}" if things == 1 else f"{things:,} {noun}s"


def size(value: float | None) -> str:
    """Bytes with a binary prefix: ``1.27 GiB``."""
    return MISSING if value is None else _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def duration(value: float | None) -> str:
    """Seconds as ``0.42 s``, ``5 min 1 s`` or ``3 h 7 min``."""
    if value is None:
        return MISSING
    whole = round(value)
    if whole < 60:
        return f"{plain(value)}{NBSP}s"
    if whole < 3600:
        return f"{whole // 60}{NBSP}min {whole % 60}{NBSP}s"
    return f"{whole // 3600:,}{NBSP}h {whole % 3600 // 60}{NBSP}min"


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= base and step < len(units) - 1:
        value, step = value / base, step + 1
    return f"{plain(value)}{NBSP}{units[step]}"
