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
from pipeline.runs import Model
from zfnet.filters import is_first
from zfnet.tracing import trace

_MOST_MAPS = 100
_SIDE = 32


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """A column for each run: filters above, each second-layer map's strongest projection below. Raises: Missing."""
    runs = [source.run, *([source.against] if source.against else [])]
    figure, axes = sheet(2, len(runs), width=3.4 * len(runs), height=7)
    for column, run in zip(axes.T, runs, strict=True):
        of_run = replace(source, run=run)
        layers = of_run.layers("deconv")
        model = run.load_model()
        first, second = _first_two(model)
        layer = _shown(layers, first, second)
        instead = "" if layer == second else f", as deconv has none of {second}"
        picture(column[0], _filters(model, first), f"{model.architecture}: filters of {first}")
        picture(column[1], _projections(of_run, layer), f"{model.architecture}: projections of {layer}{instead}")
    yield "figure6", figure


def _first_two(model: Model) -> tuple[str, str | None]:
    """The convolution of the image itself, and the one after it, if any. Raises: Missing."""
    size = model.preprocessing.crop_px
    graph = trace(model.network, (3, size, size))
    convolutions = [layer for layer in graph.layers if isinstance(graph[layer].module, nn.Conv2d)]
    for place, layer in enumerate(convolutions):
        if is_first(graph, layer):
            return layer, next(iter(convolutions[place + 1 :]), None)
    raise Missing(f"{model.architecture} has no convolution of the image itself")


def _filters(model: Model, layer: str) -> Pixels:
    """Every filter of a convolution of the image, on the scale of the largest weight of all."""
    convolution = model.network.get_submodule(layer)
    assert isinstance(convolution, nn.Conv2d)
    weights = convolution.weight.detach().permute(0, 2, 3, 1).numpy()
    if model.preprocessing.channels == "BGR":
        weights = weights[..., ::-1]
    shares = weights / (2 * np.abs(weights).max() or 1.0) + 0.5
    large = max(1, _SIDE // weights.shape[1])
    tiles = [np.kron(np.rint(255 * one).astype(np.uint8), np.ones((large, large, 1), np.uint8)) for one in shares]
    return mosaic(tiles, int(np.ceil(np.sqrt(len(tiles)))))


def _shown(layers: list[str], first: str, second: str | None) -> str:
    """The second layer; where the table has none of it, the lowest one above the first. Raises: Missing."""
    above = [layer for layer in layers if layer != first]
    if not above:
        raise Missing(f"deconv holds {first} alone; the figure shows {second}, the layer after it")
    return second if second in above else above[0]


def _projections(source: Source, layer: str) -> Pixels:
    """The strongest projection of each map."""
    rows = source.rows("deconv", ["feature_map", "rank", *PLACE, *PROJECTION], layer=layer)
    strongest = sorted((row for row in rows if row["rank"] == 1), key=lambda row: row["feature_map"])[:_MOST_MAPS]
    input_px = source.run.describe()["preprocessing"]["crop_px"]
    tiles = [projection_tile(row, input_px, _SIDE) for row in strongest]
    return mosaic(tiles, int(np.ceil(np.sqrt(len(tiles)))))
