"""Sheets of whole pictures: one file for the images of a feature map, on which the page draws the cells' boxes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import tables
from pipeline.atlas.sprites import GAP, webp
from pipeline.drawing.tiles import Pixels
from pipeline.storage import Location

ACROSS = 9
"""Pictures in a row of a sheet."""


@dataclass(frozen=True)
class Sheet:
    """A file of pictures, all of one size, in rows; the place of the n-th is known by counting."""

    path: str
    count: int
    side: int

    @property
    def width(self) -> int:
        """Of the file, in pixels."""
        return min(self.count, ACROSS) * (self.side + GAP) - GAP

    @property
    def height(self) -> int:
        """Of the file, in pixels."""
        return -(-self.count // ACROSS) * (self.side + GAP) - GAP

    def place(self, number: int) -> tuple[int, int]:
        """Left and top of a picture."""
        row, col = divmod(number, ACROSS)
        return col * (self.side + GAP), row * (self.side + GAP)


@dataclass(frozen=True)
class Pictures:
    """The small pictures of a layer's images, as they are stored."""

    jpegs: dict[str, bytes]

    @classmethod
    def of(cls, location: Location | None) -> Pictures:
        """Those of a slice of the table pictures; none where there is no slice."""
        rows = tables.read(location, ["key", "picture_jpeg"]) if location else None
        return cls(dict(zip(rows["key"].to_pylist(), rows["picture_jpeg"].to_pylist(), strict=True)) if rows else {})

    def sheet(self, path: str, keys: Sequence[str], side: int) -> tuple[Sheet, bytes] | None:
        """The pictures of these images, in their order, as a WebP file; unknown ones stay empty. None for none."""
        if not any(key in self.jpegs for key in keys):
            return None
        sheet = Sheet(path, len(keys), side)
        pixels = np.zeros((sheet.height, sheet.width, 4), dtype=np.uint8)
        for number, key in enumerate(keys):
            if key in self.jpegs:
                left, top = sheet.place(number)
                pixels[top : top + side, left : left + side, :3] = _decoded(self.jpegs[key], side)
                pixels[top : top + side, left : left + side, 3] = 255
        return sheet, webp(Image.fromarray(pixels))


def _decoded(jpeg: bytes, side: int) -> Pixels:
    image = Image.open(io.BytesIO(jpeg))
    image.draft("RGB", (side, side))  # decodes at a part of the size where that is enough
    how = Image.Resampling.NEAREST if side >= 3 * image.width else Image.Resampling.BICUBIC
    return np.asarray(image.convert("RGB").resize((side, side), how))
