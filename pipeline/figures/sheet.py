"""How figures are laid out and written: tiles of pictures side by side, PNG and PDF of the same bytes every time."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.storage import Location

Pixels = npt.NDArray[np.uint8]

WHITE = 255
DPI = 150
_LETTER = 0.55
"""Width of a letter, as a share of its size."""
_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a dollar in the name of a class is a dollar
}


def style() -> AbstractContextManager[None]:
    """Figures are drawn and written inside of it: sizes of letters, fonts that an editor of PDF can change."""
    return matplotlib.rc_context(_STYLE)


def sheet(rows: int, columns: int, width: float, height: float) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure of width x height inches and its axes [rows, columns]."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: npt.NDArray[Any] = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def write(figure: Figure, folder: Location, name: str) -> None:
    """FOLDER/NAME.png and FOLDER/NAME.pdf, without the time of day, so that the same tables give the same bytes."""
    for kind in ("png", "pdf"):
        buffer = io.BytesIO()
        nothing = {"CreationDate": None} if kind == "pdf" else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # it is drawn as a box
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=nothing)
        (folder / f"{name}.{kind}").write(buffer.getvalue())


def picture(axes: Axes, pixels: npt.NDArray[Any], title: str = "", **how: Any) -> None:
    """A picture without ticks."""
    axes.imshow(pixels, interpolation="nearest", **how)
    axes.set_axis_off()
    if title:
        axes.set_title(wrapped(title, axes))


def wrapped(title: str, axes: Axes) -> str:
    """A title in lines no longer than the axes are wide, so that it stays clear of its neighbours'."""
    points = axes.bbox.width * 72 / axes.figure.dpi
    return textwrap.fill(title, max(12, int(points / (_STYLE["axes.titlesize"] * _LETTER))))


def mosaic(tiles: Sequence[Pixels | None], columns: int, gap: int = 2) -> Pixels:
    """Tiles [side, side, RGB or RGBA] of one size in rows of `columns`, on white; None leaves a place empty."""
    side = next(tile.shape[0] for tile in tiles if tile is not None)
    rows = -(-len(tiles) // columns)
    drawn = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), WHITE, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        if tile is not None:
            top, left = (side + gap) * (place // columns), (side + gap) * (place % columns)
            drawn[top : top + side, left : left + side] = on_white(tile)
    return drawn


def on_white(tile: Pixels) -> Pixels:
    """RGB as it is; of RGBA what is not covered whole is white, as what lies outside of the image."""
    return tile if tile.shape[2] == 3 else np.where(tile[..., 3:] == 255, tile[..., :3], np.uint8(WHITE))
