"""ZFNet figure 2: of feature maps drawn at random, the nine strongest images' projections, and their patches beside."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from pipeline.figures.sheet import Pixels, mosaic, picture, sheet
from pipeline.figures.source import Source
from pipeline.figures.tiles import PLACE, PROJECTION, patch_tile, projection_tile

GRIDS = [(3, 3), (4, 4), (3, 4), (5, 2), (5, 2)]
"""Rows and columns of feature maps, layer by layer, as printed; those of the last are used for what lies above."""
NINE = 9
_SIDE, _GAP = 48, 14


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """A figure for each layer that was projected. Raises: Missing."""
    for number, layer in enumerate(source.layers("deconv")):
        yield f"figure2_{layer}", _layer(source, layer, *GRIDS[min(number, len(GRIDS) - 1)])


def _layer(source: Source, layer: str, rows: int, columns: int) -> Figure:
    alive = (row["feature_map"] for row in source.rows("top9", ["feature_map"], layer=layer))
    maps = source.chosen(alive, rows * columns)
    wanted = ["feature_map", "rank", "patch_png", *PLACE, *PROJECTION]
    found = sorted(source.rows("deconv", wanted, layer=layer), key=lambda row: row["rank"])
    input_px = source.run.describe()["preprocessing"]["crop_px"]
    columns = min(columns, len(maps))
    sides: dict[str, list[Pixels]] = {"projections": [], "patches": []}
    for number in maps:
        nine = [row for row in found if row["feature_map"] == number][:NINE]
        for name, tile in (("projections", projection_tile), ("patches", patch_tile)):
            drawn = [tile(row, input_px, _SIDE) for row in nine]
            sides[name].append(mosaic([*drawn, *[None] * (NINE - len(drawn))], 3))
    figure, axes = sheet(1, 2, width=1.1 * columns * 2 + 0.3, height=1.18 * -(-len(maps) // columns) + 0.3)
    for axis, (name, cells) in zip(axes[0], sides.items(), strict=True):
        picture(axis, mosaic(cells, columns, _GAP))
        axis.set_title(f"{layer}: {name}", pad=12)  # above the numbers of the first row
        step = cells[0].shape[0] + _GAP
        for place, number in enumerate(maps):
            axis.text(step * (place % columns), step * (place // columns) - 3, str(number), fontsize=5)
    return figure
