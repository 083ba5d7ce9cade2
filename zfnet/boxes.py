"""Hiding the object against hiding something else: which pixels of an image, drawn from a seed.

Zeiler and Fergus, ECCV 2014, Sec. 4.2, ask whether the network "is truly identifying the location of the object in the
image, or just using the surrounding context", and answer with pictures. Where the object's box is known, the mean drop
when it is hidden, beside that when as much is hidden elsewhere, is a number for it.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


class Box(NamedTuple):
    """Whole input pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels."""
        return self.height * self.width


def in_crop(edges: tuple[float, float, float, float], size_px: int) -> Box | None:
    """The smallest box of whole pixels that holds these edges (top, left, bottom, right), cut to the image.

    None where nothing of it lies in the image.
    """
    top, left = (min(max(math.floor(edge), 0), size_px) for edge in edges[:2])
    bottom, right = (min(max(math.ceil(edge), 0), size_px) for edge in edges[2:])
    return Box(top, left, bottom - top, right - left) if bottom > top and right > left else None


def shrunk(box: Box, size_px: int) -> Box:
    """The box, scaled about its middle until as many pixels lie outside `box` as in the result; at least one pixel."""
    outside = size_px**2 - box.area
    scale = min(1.0, math.sqrt(outside / box.area))
    height, width = (max(1, math.floor(side * scale)) for side in (box.height, box.width))
    return Box(box.top + (box.height - height) // 2, box.left + (box.width - width) // 2, height, width)


def mask(box: Box, size_px: int) -> Mask:
    """[size_px, size_px]: the pixels of the box."""
    found = np.zeros((size_px, size_px), bool)
    found[box.top : box.top + box.height, box.left : box.left + box.width] = True
    return found


def elsewhere(box: Box, pixels: int, size_px: int, count: int, rng: np.random.Generator) -> list[Mask]:
    """Up to `count` sets of so many pixels outside the box: those nearest to a pixel that is drawn from them all.

    Near is meant in the box's own proportions, so that where neither it nor the border is in the way, the set is a
    rectangle of its shape. Of equally near pixels the first in reading order come first. All drawn pixels are
    different; none where fewer than `pixels` lie outside.
    """
    outside = np.argwhere(~mask(box, size_px))
    if not 0 < pixels <= len(outside):
        return []
    found = []
    for middle in outside[rng.choice(len(outside), min(count, len(outside)), replace=False)]:
        distance = (abs(outside - middle) / (box.height, box.width)).max(1)
        hidden = np.zeros((size_px, size_px), bool)
        hidden[tuple(outside[np.argsort(distance, kind="stable")[:pixels]].T)] = True
        found.append(hidden)
    return found


def squares_on(places: Mask, side_px: int, count: int, rng: np.random.Generator) -> list[Mask]:
    """Up to `count` different squares inside the image whose middle pixel is one of these places [rows, cols]."""
    size_px, middle = len(places), side_px // 2
    last = size_px - side_px + 1
    corners = np.argwhere(places[middle : middle + last, middle : middle + last])
    if not len(corners):
        return []
    chosen = corners[rng.choice(len(corners), min(count, len(corners)), replace=False)]
    return [mask(Box(int(top), int(left), side_px, side_px), size_px) for top, left in chosen]


def support(projection: npt.NDArray[np.float32], share: float) -> Mask:
    """[rows, cols]: the fewest pixels of a projection [rows, cols, colours] that hold this share of its energy.

    Energy is the sum of squares over the colours; of equal pixels the first in reading order come first. A projection
    of zeros has no support.
    """
    energy = np.square(projection.astype(np.float64)).sum(2).ravel()
    order = np.argsort(-energy, kind="stable")
    before = np.cumsum(energy[order]) - energy[order]
    found = np.zeros(len(energy), bool)
    found[order[before < share * energy.sum()]] = True
    return found.reshape(projection.shape[:2])
