"""Curves over epochs as inline SVG: the numbers are turned into points here, the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 12, 36


@dataclass(frozen=True)
class Tick:
    """A number on an axis and its place in the drawing."""

    text: str
    at: float


@dataclass(frozen=True)
class Line:
    """One curve; `style` is 1, 2, 3, for colour and dashes."""

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
    """A drawing of several curves over epochs."""

    title: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    percent: bool
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM
    top: int = _TOP


def chart(
    title: str, epochs: Sequence[int], curves: Mapping[str, Sequence[float]], *, percent: bool = False
) -> Chart | None:
    """The curves over the epochs, from zero up; values that are not finite are left out. None for nothing to draw."""
    highest = max((v for values in curves.values() for v in values if math.isfinite(v)), default=None)
    if highest is None:
        return None
    up = _ticks(0.0, 1.0 if percent else highest or 1.0, whole=False)
    first, last = min(epochs), max(epochs)
    across = [tick for tick in _ticks(first, last, whole=True) if tick <= last] or [float(first)]

    def x(epoch: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * value / up[-1]

    lines = []
    for style, (name, values) in enumerate(curves.items(), start=1):
        finite = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
        points = tuple((x(epoch), y(value)) for epoch, value in finite)
        lines.append(Line(name, style, points, finite[-1][1] if finite else None))
    return Chart(
        title,
        tuple(lines),
        tuple(Tick(f"{tick:g}", x(tick)) for tick in across),
        tuple(Tick(f"{100 * tick:g} %" if percent else f"{tick:g}", y(tick)) for tick in up),
        percent,
    )


def _ticks(low: float, high: float, *, whole: bool) -> list[float]:
    locator = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole)
    return [float(tick) for tick in locator.tick_values(low, high) if tick >= low]
