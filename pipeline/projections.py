"""How a projection is stored in a table, and read back: its columns, its values, and its cut to the image."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline import tables
from pipeline.context import Context
from zfnet.deconv import Semantics

SEMANTICS_COLUMNS = [
    tables.column("cells", pa.string(), "What is projected: the one cell, or all cells of its feature map at once."),
    tables.column("seed", pa.string(), "What is fed in at the cell: its activation, or one."),
    tables.column("unpool", pa.string(), "What happens where overlapping pooling windows share a switch."),
    tables.column("normalisation", pa.string(), "Contrast normalisation on the way down: identity or gradient."),
    tables.column("relu", pa.string(), "Which rectification is applied on the way down."),
]

_VALUES: dict[str, pa.DataType] = {
    "float32": pa.list_(pa.float32()),
    "float16": pa.list_(pa.float16()),
    "png": pa.binary(),
}


def projection_columns(values: str) -> list[pa.Field]:
    """The columns that hold one projection, cut to the image."""
    how = {
        "png": "RGB PNG of 8 bits: value = (pixel - 128) / 127 * projection_scale",
        "float32": "height x width x RGB, row-major",
        "float16": "height x width x RGB, row-major, as a share of projection_scale",
    }[values]
    return [
        tables.column("projection", _VALUES[values], f"Projection in input pixels, cut to the image: {how}."),
        tables.column("projection_height", pa.int32(), "Height of the projection in pixels."),
        tables.column("projection_width", pa.int32(), "Width of the projection in pixels."),
        tables.column("projection_scale", pa.float32(), "Largest absolute value of the projection."),
    ]


def stored(projections: list[npt.NDArray[np.float32]], values: str) -> dict[str, Any]:
    """The columns of `projection_columns` for these projections [height, width, 3]."""
    scales = [float(np.abs(pixels).max(initial=0.0)) for pixels in projections]
    relative = [pixels / (scale or 1.0) for pixels, scale in zip(projections, scales, strict=True)]
    column: Any
    if values == "png":
        column = [png(np.rint(128 + 127 * pixels).astype(np.uint8)) for pixels in relative]
    elif values == "float16":  # shares, because a projection may exceed the 65,504 of a float16
        column = tables.flat_lists([pixels.astype(np.float16) for pixels in relative], pa.float16())
    else:
        column = tables.flat_lists(projections, pa.float32())
    return {
        "projection": column,
        "projection_height": [pixels.shape[0] for pixels in projections],
        "projection_width": [pixels.shape[1] for pixels in projections],
        "projection_scale": scales,
    }


def relative(row: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The projection of a row, [height, width, RGB], divided by its largest absolute value, however it was stored."""
    found = row["projection"]
    if isinstance(found, bytes):
        pixels = np.asarray(Image.open(io.BytesIO(found)).convert("RGB"), dtype=np.float32)
        return (pixels - np.float32(128)) / np.float32(127)
    values = np.asarray(found, dtype=np.float32).reshape(row["projection_height"], row["projection_width"], 3)
    largest = np.abs(values).max(initial=0)
    return values / largest if largest else values


def semantics_columns(semantics: Semantics, rows: int) -> dict[str, list[str]]:
    """The projection's semantics, for every row."""
    return {option.name: [getattr(semantics, option.name)] * rows for option in fields(semantics)}


def cut_to_image(
    context: Context, window: npt.NDArray[np.float32], top: int, left: int
) -> tuple[npt.NDArray[np.float32], tuple[int, int, int, int]]:
    """A projection [3, h, w] as [height, width, RGB], cut to the image, and its box in input pixels."""
    size = context.model.preprocessing.crop_px
    first_row, first_col = max(top, 0), max(left, 0)
    last_row, last_col = min(top + window.shape[1], size), min(left + window.shape[2], size)
    pixels = window[:, first_row - top : last_row - top, first_col - left : last_col - left].transpose(1, 2, 0)
    if context.model.preprocessing.channels == "BGR":
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels), (first_row, first_col, last_row - first_row, last_col - first_col)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """PNG of [height, width, 3] RGB."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
