"""ZFNet figure 4: a feature map's strongest projection over the training images, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from pipeline.figures.sheet import mosaic, picture, sheet
from pipeline.figures.source import Source
from pipeline.figures.tiles import PLACE, PROJECTION, projection_tile

MAPS = 6  # rows of a layer, as printed
_SIDE, _GAP = 64, 2


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """One figure with a panel for each layer. Raises: Missing."""
    layers = source.layers("evolution")
    input_px = source.run.describe()["preprocessing"]["crop_px"]
    epochs = sorted({row["epoch"] for row in source.rows("evolution", ["epoch"])})
    figure, axes = sheet(1, len(layers), width=(0.36 * len(epochs) + 0.2) * len(layers), height=0.36 * MAPS + 0.9)
    for axis, layer in zip(axes[0], layers, strict=True):
        rows = source.rows("evolution", ["epoch", "feature_map", *PLACE, *PROJECTION], layer=layer)
        maps = source.chosen((row["feature_map"] for row in rows), MAPS)
        found = {(row["feature_map"], row["epoch"]): row for row in rows}
        places = [found.get((number, epoch)) for number in maps for epoch in epochs]
        tiles = [None if row is None else projection_tile(row, input_px, _SIDE) for row in places]
        picture(axis, mosaic(tiles, len(epochs), _GAP), layer)
        step = _SIDE + _GAP
        for place, epoch in enumerate(epochs):
            where = {"ha": "center", "va": "top", "fontsize": 6}
            axis.text((place + 0.5) * step, len(maps) * step + 4, str(epoch), **where)
    figure.supxlabel("epoch")
    yield "figure4", figure
