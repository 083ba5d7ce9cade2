"""Occlusion sensitivity: which parts of an image the network's answer depends on.

Zeiler and Fergus, arXiv 1311.2901v3, Sec. 4.2 and Fig. 7 (ECCV 2014, Fig. 6): a grey square is slid over the image, and
for each of its positions are noted (b) the activation, summed over the map, of the feature map of the last convolution
that answers the unoccluded image most strongly, (d) the probability of the right class, (e) the most probable class.
All three come from the same forward passes here.

An occluder changes a window of every map and leaves the rest as it is for the clean image. So only that window is
computed, with a rim of unchanged neighbours around it, for many positions at once, until the windows cover most of the
map; the rest of the network is run whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zfnet.graph import Graph, Pair


@dataclass(frozen=True)
class Grid:
    """Where the square goes: rows and columns 0, s, 2 s, ... while it fits whole into the image; all in input pixels."""

    input_px: int
    occluder_px: int
    stride_px: int

    def __post_init__(self) -> None:
        if not 1 <= self.occluder_px <= self.input_px:
            raise ValueError(
                f"occluder_px={self.occluder_px} was given; expected 1 to {self.input_px}, the side of the input"
            )
        if self.stride_px < 1:
            raise ValueError(f"stride_px={self.stride_px} was given; expected at least 1")

    @classmethod
    def of(cls, input_px: int, occluder_px: int | None = None, stride_px: int | None = None) -> "Grid":
        """The grid for an input of that side. Default square and stride are those measured in Fig. 7 (50 and 6 pixels
        of 224, which gives 30 x 30 positions), in proportion to the input."""
        return cls(
            input_px,
            round(50 * input_px / 224) if occluder_px is None else occluder_px,
            max(1, round(6 * input_px / 224)) if stride_px is None else stride_px,
        )

    @property
    def rows(self) -> int:
        """Positions from top to bottom: floor((input - occluder) / stride) + 1."""
        return (self.input_px - self.occluder_px) // self.stride_px + 1

    @property
    def cols(self) -> int:
        """Positions from left to right."""
        return self.rows

    def positions(self) -> Tensor:
        """[rows * cols, 2]: (top, left) of the square in input pixels, row by row."""
        steps = torch.arange(self.rows) * self.stride_px
        return torch.cartesian_prod(steps, steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sensitivity:
    """The three maps of Fig. 7; each [rows, cols] of the grid."""

    grid: Grid
    layer: str
    """The last convolution."""
    feature_map: int
    """Of that layer, the one that holds the largest single activation for the clean image; the first of equals."""
    activation_map: Tensor
    """Fig. 7 (b): that feature map's activation, summed over its cells."""
    probability_map: Tensor
    """Fig. 7 (d): probability of the target class."""
    class_map: Tensor
    """Fig. 7 (e): the most probable class; the first of equals."""
    target: int
    """The class of `probability_map`."""
    clean_class: int
    """Most probable class of the unoccluded image."""
    clean_probability: float
    """Probability of the target class for the unoccluded image."""
    dense_from: str
    """The first operation that was run whole; the name of the input where nothing was computed in windows."""


def sensitivity(
    graph: Graph,
    clean: Tensor,
    filled: Tensor,
    grid: Grid,
    target: int | None = None,
    batch: int = 64,
    method: Literal["incremental", "dense"] = "incremental",
) -> Sensitivity:
    """Occlude one image at every position of the grid.

    `clean` [channels, rows, cols] is the image as the network takes it, `filled` an image made wholly of the occluder's
    colour, prepared in the same way (so the grey is a grey of pixels). `target` is the class whose probability is
    mapped, by default the clean image's most probable one. `batch` positions are run at a time. The network's output
    may be class scores or, from a softmax, probabilities. "dense" runs every occluded image whole; "incremental" gives
    the same beside rounding.

    Raises ValueError for images that fit neither grid nor network, a target that is no class, an output that is not one
    row of scores an image, and scores or activations that are not finite.
    """
    _check_images(graph, clean, filled, grid)
    layer = graph.last_convolution
    activation = graph.activation_of(layer)
    values = graph.run(clean[None], [activation, graph.output])
    _check_scores(values[graph.output], target)
    strongest = int(_first_largest(values[activation].amax((2, 3)), 1))
    clean_class = int(_first_largest(values[graph.output], 1))
    target = clean_class if target is None else target
    occluded = _Occluded(graph, clean, filled, grid, method)
    sums, probabilities, classes = [], [], []
    for tops_lefts in grid.positions().split(batch):
        maps, scores = occluded.run(tops_lefts, activation, strongest)
        if not (maps.isfinite().all() and scores.isfinite().all()):
            raise ValueError("an occluded image gives activations or scores that are not finite numbers")
        sums.append(maps.sum((1, 2)))
        probabilities.append(_probabilities(graph, scores)[:, target])
        classes.append(_first_largest(scores, 1))
    shape = (grid.rows, grid.cols)
    return Sensitivity(
        grid=grid,
        layer=layer,
        feature_map=strongest,
        activation_map=torch.cat(sums).view(shape),
        probability_map=torch.cat(probabilities).view(shape),
        class_map=torch.cat(classes).view(shape),
        target=target,
        clean_class=clean_class,
        clean_probability=float(_probabilities(graph, values[graph.output])[0, target]),
        dense_from=occluded.dense_from,
    )


def _check_images(graph: Graph, clean: Tensor, filled: Tensor, grid: Grid) -> None:
    channels, rows, cols = graph.input_shape
    if (rows, cols) != (grid.input_px, grid.input_px):
        raise ValueError(f"the grid is for {grid.input_px} px a side; the network was traced for {rows} x {cols}")
    for name, image in (("clean", clean), ("filled", filled)):
        if tuple(image.shape) != (channels, rows, cols):
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}; one image {channels} x {rows} x {cols} is expected"
            )


def _check_scores(scores: Tensor, target: int | None) -> None:
    if scores.ndim != 2:
        raise ValueError(f"the network gives {tuple(scores.shape)} for one image; one row of class scores is expected")
    if target is not None and not 0 <= target < scores.shape[1]:
        raise ValueError(f"target={target} was given; the network has the classes 0 to {scores.shape[1] - 1}")
    if not scores.isfinite().all():
        raise ValueError("the clean image gives scores that are not finite numbers")


def _probabilities(graph: Graph, scores: Tensor) -> Tensor:
    """Softmax, unless the network ends in one."""
    return scores if graph.operations[graph.output].kind == "softmax" else scores.softmax(1)


def _first_largest(x: Tensor, dim: int) -> Tensor:
    """Index of the largest value, the smallest such index: argmax itself does not say which of equals it takes."""
    index = torch.arange(x.shape[dim], device=x.device).expand_as(x)
    return torch.where(x == x.amax(dim, keepdim=True), index, x.shape[dim]).amin(dim)


# --- the forward passes ----------------------------------------------------------------------------------------------

MOSTLY = 0.7
"""Windows that cover more of a map than this are not worth cutting out. An output cell costs the same multiply-adds
in a window and in the whole map, so the share of cells is the share of the work; the rest is the price of cutting."""


class _Range(NamedTuple):
    """What an occluder changes of a map: per position the first and last row and column, and the windows that hold it.

    The windows are of one size for all positions, inside the map. Where they are larger than what changed, they hold
    values of the clean image.
    """

    first: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor]
    origin: tuple[Tensor, Tensor]
    size: Pair

    @classmethod
    def within(cls, first: Sequence[Tensor], last: Sequence[Tensor], shape: Sequence[int]) -> "_Range":
        """The range cut to a map of `shape` (maps, rows, columns)."""
        starts, ends, origins, sizes = [], [], [], []
        for low, high, length in zip(first, last, shape[1:], strict=True):
            low, high = low.clamp(0, length - 1), high.clamp(0, length - 1)
            size = max(1, int((high - low).max()) + 1)
            starts.append(low), ends.append(high), sizes.append(size)
            origins.append(low.clamp(max=length - size))
        return cls((starts[0], starts[1]), (ends[0], ends[1]), (origins[0], origins[1]), (sizes[0], sizes[1]))
