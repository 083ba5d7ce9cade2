"""Occlusion grids as pictures: heat maps with a colour bar, class maps with a legend, and their place on the image.

A grid is drawn with one pixel for each position of the square; the page enlarges it. Position (i, j) has the
square's top left at (i, j) * stride, so its cell is drawn around the square's centre, (i, j) * stride + square / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import matplotlib
import numpy as np
import numpy.typing as npt

from pipeline.drawing.tiles import Pixels

Values = npt.NDArray[np.float32]

TICKS = 5
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00",
    "#56b4e9", "#f0e442", "#332288", "#882255", "#44aa99",
)  # fmt: skip
"""Okabe and Ito's colours, which colour-blind readers tell apart, then three of Tol's; the first is the target's."""
OTHERS = "#9a9a9a"


@dataclass(frozen=True)
class Frame:
    """Where a grid lies on the image, in input pixels."""

    rows: int
    cols: int
    occluder_px: int
    occluder_width_px: int
    stride_px: int

    @property
    def top(self) -> float:
        """First pixel of the first cell, from the top."""
        return (self.occluder_px - self.stride_px) / 2

    @property
    def left(self) -> float:
        """First pixel of the first cell, from the left."""
        return (self.occluder_width_px - self.stride_px) / 2

    @property
    def height(self) -> int:
        """Height of the whole grid."""
        return self.rows * self.stride_px

    @property
    def width(self) -> int:
        """Width of the whole grid."""
        return self.cols * self.stride_px


@dataclass(frozen=True)
class Heat:
    """A heat map [rows, cols, RGB] and the numbers at even distances along its colour bar."""

    pixels: Pixels
    ticks: tuple[float, ...]


@dataclass(frozen=True)
class LegendEntry:
    """A colour of a class map; `number` is None for all classes that have no colour of their own."""

    colour: str
    number: int | None
    positions: int
    classes: int = 1


@cache
def colour_table() -> Pixels:
    """[256, RGB]: viridis, even to the eye and in grey, from low to high."""
    table: Pixels = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    return table


def heat(values: Values) -> Heat:
    """The grid in colours from its own smallest to its own largest value; a constant grid is all middle."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return Heat(np.broadcast_to(colour_table()[128], (*values.shape, 3)).copy(), (low,))
    index = np.rint(255 * ((values.astype(np.float64) - low) / (high - low))).astype(np.intp)
    return Heat(colour_table()[index], tuple(np.linspace(low, high, TICKS).tolist()))


def shares(values: Values) -> Pixels:
    """Shares from 0 to 1 [rows, cols] in colours from none to all."""
    return colour_table()[np.rint(255 * np.clip(values.astype(np.float64), 0, 1)).astype(np.intp)]


def class_colours(classes: npt.NDArray[np.int32], target: int) -> tuple[Pixels, list[LegendEntry]]:
    """The grid in one colour a class, and its legend: the target first, then by the number of positions."""
    numbers, counts = np.unique(classes, return_counts=True)
    order = sorted(zip(numbers.tolist(), counts.tolist(), strict=True), key=lambda n: (n[0] != target, -n[1], n[0]))
    colours = PALETTE if any(number == target for number, _ in order) else PALETTE[1:]
    own, rest = order[: len(colours)], order[len(colours) :]
    legend = [LegendEntry(colour, *entry) for colour, entry in zip(colours, own, strict=False)]
    drawn = np.broadcast_to(_rgb(OTHERS), (*classes.shape, 3)).copy()
    for entry in legend:
        drawn[classes == entry.number] = _rgb(entry.colour)
    if rest:
        legend.append(LegendEntry(OTHERS, None, sum(positions for _, positions in rest), len(rest)))
    return drawn, legend


def _rgb(colour: str) -> Pixels:
    return np.frombuffer(bytes.fromhex(colour[1:]), dtype=np.uint8)
