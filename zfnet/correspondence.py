"""Do features know that an eye is an eye? (ZFNet on arXiv v3, section 4.3)

The same part is masked in several images of faces. If the network relates the parts, masking one changes the features
of all images alike: the signs of the changes agree more than when unlike parts are masked.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Place = tuple[int, int]
"""Top and left of a mask in input pixels."""

Box = tuple[float, ...]
"""Top, left, height and width in input pixels."""

_UNITS_AT_A_TIME = 2**20  # counts below 2^24 are exact in float32


def centred(row: float, col: float, mask_px: int) -> Place:
    """The square mask around a point."""
    return round(row - mask_px / 2), round(col - mask_px / 2)


def lies_inside(place: Place, mask_px: int, side_px: int) -> bool:
    """Whether the whole mask lies in the image."""
    return all(0 <= start <= side_px - mask_px for start in place)


def random_places(
    parts: Sequence[Place],
    mask_px: int,
    side_px: int,
    count: int,
    rng: np.random.Generator,
    boxes: Sequence[Box] | None = None,
) -> list[Place]:
    """Masks that lie in the image whole and touch none of the parts' masks; each such place is as likely.

    Args:
        parts: the parts' masks.
        mask_px: side of every mask.
        side_px: side of the image.
        count: how many, no place twice.
        rng: decides all.
        boxes: where given, the masks' centres lie in one of these: random parts of the object.

    Raises: ValueError where there are not so many places.
    """
    size = side_px - mask_px + 1
    free = np.full((size, size), boxes is None)
    centres = np.arange(size) + mask_px / 2
    for top, left, height, width in boxes or ():
        in_rows, in_cols = (
            abs(centres - start - side / 2) <= side / 2 for start, side in ((top, height), (left, width))
        )
        free |= np.outer(in_rows, in_cols)
    for top, left in parts:
        free[max(0, top - mask_px + 1) : top + mask_px, max(0, left - mask_px + 1) : left + mask_px] = False
    places = np.flatnonzero(free)
    if len(places) < count:
        raise ValueError(f"there is room for {len(places)} of {count} random masks of {mask_px} px beside the parts")
    chosen = rng.choice(places, size=count, replace=False)
    return [(int(place) // size, int(place) % size) for place in chosen]


def masked(x: Tensor, filled: Tensor, places: Sequence[Place], mask_px: int) -> Tensor:
    """A copy of an image for each mask.

    Args:
        x: [channels, rows, cols].
        filled: [channels, rows, cols], what the masks show.
        places: the masks.
        mask_px: their side.

    Returns: [masks, channels, rows, cols].
    """
    copies = x.expand(len(places), *x.shape).clone()
    for copy, (top, left) in zip(copies, places, strict=True):
        under = (..., slice(top, top + mask_px), slice(left, left + mask_px))
        copy[under] = filled[under]
    return copies


def change_signs(clean: Tensor, masked: Tensor, least: float = 0.0) -> Tensor:
    """Signs of the changes x - x~, three-valued: -1, 0, 1.

    Args:
        clean: [units], features of the image as it is.
        masked: [M, units], of its masked copies.
        least: changes of at most this share of the largest clean activation count as none.

    Returns: int8 [M, units].
    """
    change = clean - masked
    change[change.abs() <= least * clean.abs().max()] = 0
    return change.sign().to(torch.int8)


def sign_distances(signs: Tensor) -> tuple[Tensor, Tensor]:
    """Hamming distances of all pairs of images, and in how many units at least one of the two changed.

    Args:
        signs: int8 [N, units], -1, 0 or 1.

    Returns: int64 [N, N] each.
    """
    agree = torch.zeros(len(signs), len(signs), dtype=torch.int64)
    both_unchanged = agree.clone()
    for some in signs.split(_UNITS_AT_A_TIME, dim=1):
        for sign in (-1, 0, 1):
            is_so = (some == sign).to(torch.float32)
            together = (is_so @ is_so.T).to(torch.int64)
            agree += together
            if sign == 0:
                both_unchanged += together
    return signs.shape[1] - agree, signs.shape[1] - both_unchanged
