"""From a stored projection or patch to the pixels of one tile.

A tile shows the receptive field's whole box, at one scale for all tiles of a layer; where that is larger than the
image, it shows the image. Projection and patch are cut to the image, so at its border they fill only a part of the
box; the rest is hatched, which is neither zero (grey) nor black. A projection is signed: zero is mid-grey, and each
tile is scaled by its own largest value.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ENLARGE_BY_PIXELS = 3.0
"""From this scale on, pixels are shown as the squares they are; below, they are interpolated."""


@dataclass(frozen=True)
class Box:
    """A receptive field in input pixels; it may leave the image at the top or the left (and at the other sides)."""

    top: int
    left: int
    height: int
    width: int

    def within(self, input_px: int) -> Box:
        """The box, or along an axis on which it is longer than the image, the image as seen from what is cut of it."""
        rows = (self.top, self.height) if self.height <= input_px else (-max(self.top, 0), input_px)
        cols = (self.left, self.width) if self.width <= input_px else (-max(self.left, 0), input_px)
        return Box(rows[0], cols[0], rows[1], cols[1])


def around_grey(relative: Floats) -> Pixels:
    """Pixels of values from -1 to 1: zero is mid-grey (128), as v / (2 max|v|) + 0.5."""
    return np.rint(255 * (relative / 2 + 0.5)).astype(np.uint8)


def patch_of(row: Mapping[str, Any]) -> Pixels:
    """The patch of a row of deconv, [height, width, RGB]."""
    return np.asarray(Image.open(io.BytesIO(row["patch_png"])).convert("RGB"))


def image_of(row: Mapping[str, Any]) -> Pixels:
    """The network's input pixels of a row with `image_png`."""
    return np.asarray(Image.open(io.BytesIO(row["image_png"])).convert("RGB"))


def tile(pixels: Pixels, box: Box, side: int) -> Pixels:
    """The pixels at their place in the box, the box centred in a square [side, side, RGBA]; the rest is hatched."""
    scale = side / max(box.height, box.width)
    above = round((side - box.height * scale) / 2) if box.height < box.width else 0
    before = round((side - box.width * scale) / 2) if box.width < box.height else 0
    rows = [above + round(scale * r) for r in _span(box.top, pixels.shape[0])]
    cols = [before + round(scale * c) for c in _span(box.left, pixels.shape[1])]
    drawn = _hatch(side).copy()
    drawn[rows[0] : rows[1], cols[0] : cols[1], :3] = _resized(pixels, rows[1] - rows[0], cols[1] - cols[0], scale)
    drawn[rows[0] : rows[1], cols[0] : cols[1], 3] = 255
    return drawn


def _span(first: int, length: int) -> tuple[int, int]:
    """Where the part that lies in the image begins and ends, counted from the box's own first pixel."""
    begin = max(first, 0) - first
    return begin, begin + length


def _resized(pixels: Pixels, height: int, width: int, scale: float) -> Pixels:
    if 0 in (height, width):
        return np.zeros((height, width, 3), dtype=np.uint8)
    how = Image.Resampling.NEAREST if scale >= ENLARGE_BY_PIXELS else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((width, height), how))


@cache
def _hatch(side: int) -> Pixels:
    """[side, side, RGBA]: thin half-transparent diagonals on nothing, which read on light and dark pages alike."""
    rows, cols = np.indices((side, side))
    drawn = np.zeros((side, side, 4), dtype=np.uint8)
    drawn[(rows + cols) % 8 < 2] = (128, 128, 128, 90)
    return drawn
