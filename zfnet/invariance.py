"""How far features move when the image is moved, enlarged or turned (ZFNet on arXiv v3, figure 5).

The paper states neither interpolation nor what is shown where the altered image has no pixels; both are options. An
altered image is an image again: uint8, resampled by Pillow, the same on every machine.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zfnet.features import features
from zfnet.graph import Graph
from zfnet.images import Pixels

Transform = Literal["vertical", "horizontal", "scale", "rotation"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)

Interpolation = Literal["nearest", "bilinear", "bicubic"]

Border = Literal["edge", "reflect", "wrap"]
BORDERS: tuple[Border, ...] = get_args(Border)

_RIM = 3
"""Pixels beyond the outermost that is asked for, which interpolation reads."""

Row = tuple[float, float, float]


def altered(
    pixels: Pixels,
    transform: Transform,
    amount: float,
    interpolation: Interpolation = "bilinear",
    fill: Border | tuple[int, ...] = (124, 124, 124),
) -> Pixels:
    """The image moved, enlarged about its centre, or turned about it.

    Args:
        pixels: uint8 [rows, cols, 3].
        transform: what is done.
        amount: pixels down (vertical) or to the right (horizontal), ratio (scale; above 1 enlarges), or degrees
            counter-clockwise (rotation).
        interpolation: between pixels. Whole pixels and quarter turns are exact by any.
        fill: what is shown beyond the image: a colour, its outermost pixels, its mirror image, or itself again.

    Returns: uint8 [rows, cols, 3].
    """
    height, width = pixels.shape[:2]
    across, down = _source(transform, amount, height, width)
    rim = _overhang(across, down, height, width) + _RIM
    shifted = (*across[:2], across[2] + rim, *down[:2], down[2] + rim)
    resample = Image.Resampling[interpolation.upper()]
    channels = [  # as floats, because Pillow cuts the fractions of bytes off instead of rounding them
        np.asarray(Image.fromarray(channel).transform((width, height), Image.Transform.AFFINE, shifted, resample))
        for channel in np.moveaxis(_padded(pixels, rim, fill), 2, 0).astype(np.float32)
    ]
    resampled: Pixels = np.rint(np.stack(channels, axis=2)).clip(0, 255).astype(np.uint8)
    return resampled


def _source(transform: Transform, amount: float, height: int, width: int) -> tuple[Row, Row]:
    """Where an output pixel (x, y, 1) comes from, as two rows of a matrix; a pixel's centre lies at halves."""
    if transform == "vertical":
        return (1, 0, 0), (0, 1, -amount)
    if transform == "horizontal":
        return (1, 0, -amount), (0, 1, 0)
    if transform == "scale":
        cos, sin = 1 / amount, 0.0
    else:
        cos, sin = math.cos(math.radians(amount)), math.sin(math.radians(amount))
    x, y = width / 2, height / 2
    return (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)


def _overhang(across: Row, down: Row, height: int, width: int) -> int:
    """Pixels by which the source of the output's corners lies beyond the image."""
    corners = np.array([(x, y, 1) for x in (0, width) for y in (0, height)])
    beyond = [0.0]
    for row, size in ((across, width), (down, height)):
        source = corners @ np.array(row)
        beyond += [-source.min(), source.max() - size]
    return math.ceil(max(beyond))


def _padded(pixels: Pixels, rim: int, fill: Border | tuple[int, ...]) -> Pixels:
    widths = ((rim, rim), (rim, rim), (0, 0))
    if isinstance(fill, str):
        return np.pad(pixels, widths, mode="symmetric" if fill == "reflect" else fill)
    wider = np.empty((pixels.shape[0] + 2 * rim, pixels.shape[1] + 2 * rim, 3), np.uint8)
    wider[:] = fill
    wider[rim:-rim, rim:-rim] = pixels
    return wider


@dataclass(frozen=True, eq=False)
class Response:
    """How the network answers to M images, compared with the first of them."""

    distance: dict[str, Tensor]
    """Layer -> float64 [M], Euclidean distance of the feature vectors from the first image's."""
    length: dict[str, float]
    """Layer -> Euclidean length of the first image's feature vector."""
    output: Tensor
    """[M, units], what the network gives."""


def response(graph: Graph, x: Tensor, layers: tuple[str, ...], at_a_time: int = 32) -> Response:
    """Distances from the first image at each layer, and the output, `at_a_time` images at a time.

    Args:
        graph: of the network.
        x: [M, channels, rows, columns], the clean image first.
        layers: layers, or any other operations.
        at_a_time: images that go through the network together.

    Raises: UnknownLayer, NotFinite.
    """
    clean: dict[str, Tensor] = {}
    distances: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    outputs = []
    for some in x.split(at_a_time):
        found = features(graph, some, [*layers, graph.output])
        clean = clean or {layer: found[layer][0].clone() for layer in layers}
        for layer in layers:
            distances[layer].append(_length(found[layer] - clean[layer]))
        outputs.append(found[graph.output])
    lengths = {layer: float(_length(clean[layer][None])) for layer in layers}
    return Response({layer: torch.cat(some) for layer, some in distances.items()}, lengths, torch.cat(outputs))


def _length(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    return length
