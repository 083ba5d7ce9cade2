"""ZFNet figure 6 (arXiv v3): the first layer's filters and the second layer's projections, of one run or of two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from pipeline.figures.sheet import Pixels, mosaic, picture, sheet
from pipeline.figures.source import Missing, Source
from pipeline.figures.tiles import PLACE, PROJECTION, projection_tile
from pipeline.runs import Run

_MOST_MAPS = 100
_SIDE = 32


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """A column for each run: filters above, each second-layer map's strongest projection below. Raises: Missing."""
    runs = [source.run, *([source.against] if source.against else [])]
    figure, axes = sheet(2, len(runs), width=3.4 * len(runs), height=7)
    for column, run in zip(axes.T, runs, strict=True):
        layer, pixels = _second_layer(replace(source, run=run))
        name = run.describe()["architecture"]
        picture(column[0], _filters(run), f"{name}: filters of the first layer")
        picture(column[1], pixels, f"{name}: projections of {layer}")
    yield "figure6", figure


def _filters(run: Run) -> Pixels:
    """Every filter of the first convolution that sees the image, on the scale of the largest weight of all."""
    model = run.load_model()
    convolutions = (m for m in model.network.modules() if isinstance(m, nn.Conv2d))
    first = next((m for m in convolutions if m.in_channels == 3), None)
    if first is None:
        raise Missing(f"{model.architecture} has no convolution of an image's three channels")
    weights = first.weight.detach().permute(0, 2, 3, 1).numpy()
    if model.preprocessing.channels == "BGR":
        weights = weights[..., ::-1]
    shares = weights / (2 * np.abs(weights).max() or 1.0) + 0.5
    large = max(1, _SIDE // weights.shape[1])
    tiles = [np.kron(np.rint(255 * one).astype(np.uint8), np.ones((large, large, 1), np.uint8)) for one in shares]
    return mosaic(tiles, int(np.ceil(np.sqrt(len(tiles)))))


def _second_layer(source: Source) -> tuple[str, Pixels]:
    layers = source.layers("deconv")
    if len(layers) < 2:
        raise Missing(f"deconv holds {layers} alone; the figure shows the second layer")
    rows = source.rows("deconv", ["feature_map", "rank", *PLACE, *PROJECTION], layer=layers[1])
    strongest = sorted((row for row in rows if row["rank"] == 1), key=lambda row: row["feature_map"])[:_MOST_MAPS]
    input_px = source.run.describe()["preprocessing"]["crop_px"]
    tiles = [projection_tile(row, input_px, _SIDE) for row in strongest]
    return layers[1], mosaic(tiles, int(np.ceil(np.sqrt(len(tiles)))))
