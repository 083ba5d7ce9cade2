"""Charts as inline SVG and as tables of bars: numbers are turned into points and lengths here, templates draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 36
STYLES = 8
"""Ways to draw a curve that are told apart; more curves begin again."""
_CURVES = 2 * STYLES
_POINTS = 400
"""Of a curve at most: as many as the drawing is wide."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A number on an axis and its place in the drawing."""

    text: str
    at: float


@dataclass(frozen=True)
class Line:
    """One curve; `style` is 1, 2, 3, ..., for colour and dashes."""

    name: str
    style: int
    points: tuple[tuple[float, float], ...]
    last: float | None

    @property
    def path(self) -> str:
        """The curve as SVG points."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.points)


@dataclass(frozen=True)
class Chart:
    """A drawing of several curves."""

    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    percent: bool
    axis: str
    """What goes across."""
    left_out: int
    """Curves that are not shown."""
    kind: str = field(default="lines", init=False)
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM
    top: int = _TOP


@dataclass(frozen=True)
class Bar:
    """One value and its length, from 0 to 100."""

    value: float | None
    length: float
    style: int


@dataclass(frozen=True)
class Bars:
    """A table of bars: a row for each category, a bar for each series."""

    title: str
    series: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]
    percent: bool
    left_out: int = 0
    """Rows that are not shown."""
    kind: str = field(default="bars", init=False)


@dataclass(frozen=True)
class Histogram:
    """Counts over a logarithmic axis, as one SVG path."""

    path: str
    ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...]
    """Quantiles."""
    tallest: int
    width: int = WIDTH
    height: int = 150
    bottom: int = 110


def chart(title: str, curves: Mapping[str, Points], *, axis: str = "epoch", percent: bool = False) -> Chart | None:
    """Curves of (x, y), over zero and whatever is below it; what is not finite is left out. None: nothing to draw."""
    shown = dict(islice(curves.items(), _CURVES))
    finite = {name: _thinned([(x, y) for x, y in points if math.isfinite(y)]) for name, points in shown.items()}
    every = [point for points in finite.values() for point in points]
    if not every:
        return None
    lowest, highest = min(0.0, *(y for _, y in every)), max(0.0, *(y for _, y in every))
    up = _ticks(lowest, max(highest, 1.0 if percent else 0.0) or 1.0, whole=False)
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    whole = all(float(x).is_integer() for x, _ in every)
    across = [tick for tick in _ticks(first, last, whole=whole) if first <= tick <= last] or [float(first)]

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - first) / (last - first) if last > first else 0.5
        above = (y - up[0]) / (up[-1] - up[0])
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * right, HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * above

    lines = [
        Line(name, i % STYLES + 1, tuple(place(*point) for point in points), points[-1][1] if points else None)
        for i, (name, points) in enumerate(finite.items())
    ]
    return Chart(
        title,
        tuple(lines),
        tuple(Tick(f"{tick:g}", place(tick, 0)[0]) for tick in across),
        tuple(Tick(f"{100 * tick:g} %" if percent else f"{tick:g}", place(first, tick)[1]) for tick in up),
        percent,
        axis,
        len(curves) - len(shown),
    )


def _thinned(points: Points) -> Points:
    """Points at even distances where there are more than are seen, with the last."""
    step = -(-len(points) // _POINTS)
    return [*points[:-1:step], points[-1]] if step > 1 else points


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole)
    return [float(tick) + 0.0 for tick in locator.tick_values(low, high)]


def bars(
    title: str,
    series: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    percent: bool = False,
    most: int = 40,
) -> Bars | None:
    """Bars by category and series, to one scale; a bar of what is below zero has no length. None: nothing to draw."""
    known = [value for _, values in rows for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    largest = max(1.0 if percent else 0.0, *known) or 1.0
    drawn = [
        (name, tuple(_bar(value, largest, i % STYLES + 1) for i, value in enumerate(values)))
        for name, values in rows[:most]
    ]
    return Bars(title, tuple(series), tuple(drawn), percent, max(0, len(rows) - most))


def _bar(value: float | None, largest: float, style: int) -> Bar:
    finite = value is not None and math.isfinite(value)
    return Bar(value if finite else None, round(max(0.0, 100 * (value or 0.0) / largest), 2) if finite else 0.0, style)


def histogram(counts: Sequence[int], edges: Sequence[float], quantiles: Mapping[float, float]) -> Histogram | None:
    """Counts between positive edges, on a logarithmic axis; quantiles of zero are not marked. None for no counts."""
    if not counts or edges[0] <= 0:
        return None
    low, high = math.log(edges[0]), math.log(edges[-1])
    drawn = Histogram("", (), (), max(counts))

    def x(value: float) -> float:
        return 8 + (drawn.width - 16) * (math.log(value) - low) / (high - low)

    path = "".join(
        f"M{x(a):.1f} {drawn.bottom}V{drawn.bottom - 100 * n / drawn.tallest:.1f}H{x(b):.1f}V{drawn.bottom}Z"
        for n, a, b in zip(counts, edges, edges[1:], strict=False)
        if n
    )
    ticks = tuple(Tick(f"{value:.3g}", x(value)) for value in _on_log(edges[0], edges[-1]))
    inside = {share: value for share, value in quantiles.items() if edges[0] <= value <= edges[-1]}
    marks = tuple(Tick(f"{share:.0%}", x(value)) for share, value in inside.items())
    return Histogram(path, ticks, marks, drawn.tallest)


def _on_log(low: float, high: float) -> list[float]:
    """At most six round numbers from low to high: powers of ten, or 1, 2 and 5 times them where these are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
        found = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(found) >= 3:
            break
    step = -(-len(found) // 6)
    return found[::step] if found else [low, high]
