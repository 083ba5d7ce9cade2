"""From a row of a table to the tiles of a figure: its projection and its patch."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline import projections
from pipeline.drawing.tiles import Box, around_grey, patch_of, tile
from pipeline.figures.sheet import Pixels

PLACE = ["top", "left", "height", "width"]
PROJECTION = ["projection", "projection_height", "projection_width"]


def projection_tile(row: dict[str, Any], input_px: int, side: int) -> Pixels:
    """The projection in its receptive field, zero mid-grey, scaled by its own largest value."""
    return tile(around_grey(projections.relative(row)), _box(row, input_px), side)


def patch_tile(row: dict[str, Any], input_px: int, side: int) -> Pixels:
    """The patch of the image in its receptive field."""
    return tile(patch_of(row), _box(row, input_px), side)


def whole_projection(row: dict[str, Any], input_px: int) -> Pixels:
    """The projection at its place in the image [input_px, input_px, RGB], mid-grey around it."""
    drawn = np.full((input_px, input_px, 3), 128, dtype=np.uint8)
    pixels = around_grey(projections.relative(row))
    top, left = max(row["top"], 0), max(row["left"], 0)
    drawn[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return drawn


def _box(row: dict[str, Any], input_px: int) -> Box:
    return Box(*(int(row[side]) for side in PLACE)).within(input_px)
