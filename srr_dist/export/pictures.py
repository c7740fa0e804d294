"""The report's pictures as inline SVG; colours come from the page's style sheet by class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from srr_dist.export.markup import Html, decimal, tag
from srr_dist.export.quantities import MISSING

PANEL = (260, 136)
PLOT = (44, 254, 8, 116)  # left, right, top, bottom of a panel's plot
MAP_WIDTH = 1160
MAP_LABELS = 190
POINTS = 32  # of one spectrum; more cannot be told apart in a panel


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map from ``low … high`` to the pixels ``start … end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; the middle where the axis has no length."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """At most five round values inside the axis."""
        return self._log_ticks() if self.log else self._linear_ticks()

    def _linear_ticks(self) -> list[float]:
        step = next(s * 10**e for e in range(12) for s in (1, 2, 5) if (self.high - self.low) / (s * 10**e) < 5)
        first = math.ceil(self.low / step)
        return [float(i * step) for i in range(first, math.floor(self.high / step) + 1)] or [self.low]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            found = [v for e in decades for d in digits if self.low <= (v := d * 10.0**e) <= self.high]
            if len(found) >= 3:
                break
        return found[:: math.ceil(len(found) / 5) or 1]


def log_axis(values: Iterable[float | None]) -> Axis | None:
    """The upward logarithmic axis of a panel that holds all positive values; None where there are none."""
    positive = [value for value in values if value is not None and value > 0]
    if not positive:
        return None
    low, high = min(positive), max(positive)
    margin = max((high / low) ** 0.04, (3 * low / high) ** 0.5, 1.05)
    return Axis(low / margin, high * margin, PLOT[3], PLOT[2], log=True)


def depth_axis(blocks: Iterable[int]) -> Axis:
    """The axis of a panel from the first to the last of the blocks."""
    present = sorted(blocks)
    return Axis(present[0], present[-1], PLOT[0] + 6, PLOT[1] - 6)


@dataclass(frozen=True)
class Line:
    """One line of a panel: the CSS class, (x, y) points, and how far from the first line of its family (0 … 1)."""

    style: str
    points: Sequence[tuple[float, float | None]]
    fade: float | None = None


def panel(
    caption: str,
    lines: Iterable[Line],
    x: Axis,
    y: Axis,
    *,
    label: str,
    tick: Callable[[float], str],
    notes: Mapping[int, str] | None = None,
) -> Html:
    """One small picture with lines over a common frame.

    Args:
        caption: shown above.
        lines: later ones are drawn over earlier ones; a point without a positive value interrupts its line.
        x: the horizontal axis.
        y: the vertical axis, logarithmic.
        label: the picture in words.
        tick: writes a value of the vertical axis.
        notes: text that appears when the pointer rests on that x.
    """
    marks = [mark for line in lines for mark in _line(line, x, y)]
    half = min((x.end - x.start) / max(x.high - x.low, 1), 40) / 2
    targets = [
        tag(
            "rect",
            tag("title", text),
            class_="hit",
            x=x(at) - half,
            width=2 * half,
            y=PLOT[2],
            height=PLOT[3] - PLOT[2],
        )
        for at, text in (notes or {}).items()
    ]
    drawing = tag(
        "svg", *_frame(x, y, tick), *marks, *targets, viewBox=f"0 0 {PANEL[0]} {PANEL[1]}", role="img", aria_label=label
    )
    return tag("figure", tag("figcaption", caption, title=caption), drawing, class_="panel")


def spectrum(values: Sequence[float]) -> list[tuple[float, float | None]]:
    """(1-based index, value) of a spectrum, thinned evenly to about `POINTS` with both ends kept."""
    step = math.ceil(len(values) / POINTS) or 1
    kept = sorted({*range(0, len(values), step), len(values) - 1}) if values else []
    return [(float(i + 1), values[i]) for i in kept]


def depth_map(rows: Mapping[str, Mapping[int, float | None]], blocks: Sequence[int], top: float, *, label: str) -> Html:
    """A row per layer type, a column per block, a cell as strong as its value is beside ``top``.

    Args:
        rows: value by type and block; a type has cells only for the blocks it names, None is an empty frame.
        blocks: first to last, the columns.
        top: the value of the strongest cell.
        label: the picture in words.
    """
    cell = min((MAP_WIDTH - MAP_LABELS) / len(blocks), 44.0)
    height = 18 if len(rows) <= 16 else 13
    column = {block: MAP_LABELS + i * cell for i, block in enumerate(blocks)}
    marks: list[Html] = []
    for i, (name, values) in enumerate(rows.items()):
        marks.append(tag("text", name, x=MAP_LABELS - 8, y=(i + 0.5) * height, class_="row"))
        for block, value in values.items():
            marks.append(_cell(f"{name}, block {block}", value, top, (column[block], i * height, cell, height)))
    bottom = len(rows) * height
    every = 1 if cell >= 24 else math.ceil(len(blocks) / 16)
    marks += [
        tag("text", str(block), x=column[block] + cell / 2, y=bottom + 12, class_="tick middle")
        for block in blocks[::every]
    ]
    return tag("svg", *marks, viewBox=f"0 0 {MAP_WIDTH} {bottom + 18}", role="img", aria_label=label, class_="map")


def bar(parts: Iterable[tuple[str, float]], whole: float, *, label: str, target: float | None = None) -> Html:
    """A horizontal bar of parts (CSS class, length) on a scale from 0 to ``whole``, with a mark at the target."""
    at, marks = 0.0, []
    scale = 100 / whole if whole > 0 else 0.0
    for style, length in parts:
        marks.append(tag("rect", x=at * scale, y=1, width=length * scale, height=8, class_=style))
        at += length
    if target is not None:
        marks.append(tag("rect", x=min(target * scale, 99.0), y=0, width=1, height=10, class_="target"))
    return tag(
        "svg", *marks, viewBox="0 0 100 10", preserveAspectRatio="none", role="img", aria_label=label, class_="bar"
    )


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """What the CSS classes of a picture mean: (meaning, class)."""
    return tag("p", *(tag("span", tag("i", class_=style), text) for text, style in entries), class_="legend")


def _line(line: Line, x: Axis, y: Axis) -> list[Html]:
    """A path through every run of neighbouring points, and a dot for a point that has no neighbour."""
    runs: list[list[str]] = [[]]
    for at, value in line.points:
        if value is not None and value > 0:
            runs[-1].append(f"{x(at):.1f} {y(value):.1f}")
        elif runs[-1]:
            runs.append([])
    style = None if line.fade is None else f"--fade:{line.fade:.2f}"
    dots = [run[0].split() for run in runs if len(run) == 1]
    drawn = "".join("M" + "L".join(run) for run in runs if len(run) > 1)
    marks = [tag("path", d=drawn, class_=line.style, style=style)] if drawn else []
    return marks + [tag("circle", cx=cx, cy=cy, r=3, class_=line.style, style=style) for cx, cy in dots]


def _frame(x: Axis, y: Axis, tick: Callable[[float], str]) -> list[Html]:
    left, right, _, bottom = PLOT
    marks = []
    for value in y.ticks():
        marks.append(tag("line", x1=left, x2=right, y1=y(value), y2=y(value), class_="grid"))
        marks.append(tag("text", tick(value), x=left - 4, y=y(value), class_="tick end"))
    return marks + [tag("text", decimal(at), x=x(at), y=bottom + 13, class_="tick middle") for at in x.ticks()]


def _cell(name: str, value: float | None, top: float, box: tuple[float, float, float, float]) -> Html:
    x, y, width, height = box
    share = 0.0 if value is None or top <= 0 else min(max(value / top, 0.0), 1.0)
    text = MISSING if value is None else decimal(value)
    frame = tag(
        "rect",
        tag("title", f"{name}: {text}"),
        x=x + 0.5,
        y=y + 0.5,
        width=width - 1,
        height=height - 1,
        class_="none" if value is None else "cell",
        fill_opacity=0.05 + 0.57 * share,  # never so strong that the text in it cannot be read
    )
    if width < 22 or height < 16:
        return frame
    return tag("g", frame, tag("text", text, x=x + width / 2, y=y + height / 2, class_="middle"))
