"""Occlusion sensitivity: which parts of an image the network's answer depends on.

Zeiler and Fergus, arXiv 1311.2901v3, Sec. 4.2 and Fig. 7 (ECCV 2014, Fig. 6): a grey square is slid over the image,
and for each of its positions are noted (b) the activation, summed over the map, of the feature map of the last
convolution that answers the unoccluded image most strongly, (d) the probability of the right class, (e) the most
probable class. All three come from the same forward passes here, and those compute only what the square changes
(`zfnet.incremental`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zfnet.features import last_hidden_convolution
from zfnet.graph import Graph
from zfnet.incremental import Axis, Change, Incremental
from zfnet.occluded import Occluded

COARSE = 4
"""A map that is refined is first computed at every fourth position along rows and columns."""


@dataclass(frozen=True)
class Grid:
    """Where the occluder goes: its rows and columns start at 0, s, 2 s, ... of the image; all in input pixels."""

    input_px: int
    occluder_px: int
    """Side of a square; height of a rectangle."""
    stride_px: int
    occluder_width_px: int | None = None
    """Width of a rectangle; None for a square."""
    overhang: Literal["leave", "clip"] = "leave"
    """Whether a last position is added where the image is not covered to its end, its occluder cut off at the border
    (captum's grid). "leave": only whole occluders."""

    def __post_init__(self) -> None:
        for name in ("occluder_px", "occluder_width_px"):
            side = getattr(self, name)
            if side is not None and not 1 <= side <= self.input_px:
                raise ValueError(f"{name}={side} was given; expected 1 to {self.input_px}, the side of the input")
        if self.stride_px < 1:
            raise ValueError(f"stride_px={self.stride_px} was given; expected at least 1")
        if self.overhang not in ("leave", "clip"):
            raise ValueError(f"overhang={self.overhang!r} was given; expected 'leave' or 'clip'")
        if self.overhang == "clip" and self.stride_px > min(self.occluder_px, self.width_px):
            raise ValueError(
                f"overhang='clip' was given with stride_px={self.stride_px}; a stride of at most the occluder's sides "
                f"({self.occluder_px} and {self.width_px}) is expected, or its last position may lie outside the image"
            )

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
    def width_px(self) -> int:
        """Width of the occluder."""
        return self.occluder_px if self.occluder_width_px is None else self.occluder_width_px

    @property
    def rows(self) -> int:
        """Positions from top to bottom: floor((input - occluder) / stride) + 1; with a clipped one, ceil."""
        return self._places(self.occluder_px)

    @property
    def cols(self) -> int:
        """Positions from left to right."""
        return self._places(self.width_px)

    def _places(self, side: int) -> int:
        clipped = self.stride_px - 1 if self.overhang == "clip" else 0
        return (self.input_px - side + clipped) // self.stride_px + 1

    def positions(self) -> Tensor:
        """[rows * cols, 2]: (top, left) of the occluder in input pixels, row by row."""
        rows, cols = self.extents()
        return torch.cartesian_prod(rows.first, cols.first)

    def extents(self) -> Change:
        """First and last pixel row of the occluder for every row of the grid; the same of its columns."""
        firsts = [torch.arange(n) * self.stride_px for n in (self.rows, self.cols)]
        rows, cols = (
            Axis.within(first, first + side - 1, self.input_px)
            for first, side in zip(firsts, (self.occluder_px, self.width_px), strict=True)
        )
        return rows, cols


@dataclass(frozen=True, kw_only=True, eq=False)
class Sensitivity:
    """The three maps of Fig. 7; each [rows, cols] of the grid."""

    grid: Grid
    layer: str
    """The convolution whose strongest map is watched (`watched_layer`)."""
    feature_map: int
    """Of that layer, the one that holds the largest single activation for the clean image; the first of equals."""
    activation_map: Tensor
    """Fig. 7 (b): that feature map's activation, summed over its cells."""
    probability_map: Tensor
    """Fig. 7 (d): probability of the target class."""
    class_map: Tensor
    """Fig. 7 (e): the most probable class; the first of equals."""
    probabilities: Tensor | None
    """[rows, cols, classes]: of all classes, where they were asked for."""
    exact: bool
    """Whether every position was computed; False where the maps are interpolated in part."""
    target: int
    """The class of `probability_map`."""
    clean_class: int
    """Most probable class of the unoccluded image."""
    clean_probability: float
    """Probability of the target class for the unoccluded image."""
    clean_class_probability: float
    """Probability of the most probable class for the unoccluded image."""
    dense_from: str
    """The first operation that was run whole; the name of the input where nothing was computed in windows."""
    clean_probabilities: Tensor
    """[classes], for the unoccluded image."""
    lowest_probabilities: Tensor
    """[classes], with the occluder where `probability_map` is lowest, the first of equals; computed there, always."""


def sensitivity(
    graph: Graph,
    clean: Tensor,
    filled: Tensor,
    grid: Grid,
    target: int | None = None,
    *,
    memory_mb: float = 256,
    method: Literal["incremental", "dense"] = "incremental",
    refine: float = 1.0,
    all_probabilities: bool = False,
) -> Sensitivity:
    """Occlude one image at every position of the grid.

    `clean` [channels, rows, cols] is the image as the network takes it; the occluder shows what `filled` has in its
    place, prepared in the same way (so a grey is a grey of pixels). `target` is the class whose probability is mapped,
    by default the clean image's most probable one. So many positions are run at a time that they need about
    `memory_mb` megabytes. The network's output may be class scores or, from a softmax, probabilities. "dense" runs
    every occluded image whole; "incremental" gives the same beside rounding.

    `refine` below 1 is not exact: every fourth row and column of the grid is computed, then that share of all positions
    where these change the maps most, and the rest is interpolated (Nakandala et al., Krypton, SIGMOD 2019, Sec. 5.2
    refine in the same way).

    Raises ValueError for images that fit neither grid nor network, a target that is no class, an output that is not one
    row of scores an image, and scores or activations that are not finite.
    """
    _check_images(graph, clean, filled, grid)
    _check_options(method, refine, memory_mb)
    seen = _look(graph, clean, target)
    plan = Incremental(graph, grid.extents(), graph.activation_of(seen.layer), windows=method == "incremental")
    occluded = Occluded(plan, clean, filled, seen.feature_map)
    maps, lowest = _mapped(occluded, seen, grid, refine, int(memory_mb * 2**20), all_probabilities)
    shape = (grid.rows, grid.cols)
    return Sensitivity(
        grid=grid,
        activation_map=maps.activation.view(shape),
        probability_map=maps.probability.view(shape),
        class_map=maps.top_class.view(shape),
        probabilities=maps.probabilities.view(*shape, -1) if all_probabilities else None,
        exact=refine == 1,
        dense_from=occluded.dense_from,
        lowest_probabilities=lowest,
        **_described(seen),
    )


class _Clean(NamedTuple):
    """What the network makes of the image as it is."""

    layer: str
    feature_map: int
    activation: Tensor
    """Of that map, summed over its cells."""
    target: int
    class_: int
    probabilities: Tensor


def _look(graph: Graph, clean: Tensor, target: int | None) -> _Clean:
    """The strongest map of the watched layer, and the classes; the target is the most probable one without another."""
    layer = watched_layer(graph)
    activation = graph.activation_of(layer)
    values = graph.run(clean[None], [activation, graph.output])
    _check_scores(values[graph.output], target)
    strongest = int(_first_largest(values[activation].amax((2, 3)), 1))
    class_ = int(_first_largest(values[graph.output], 1))
    return _Clean(
        layer,
        strongest,
        values[activation][0, strongest].sum(),
        class_ if target is None else target,
        class_,
        _probabilities(graph, values[graph.output])[0],
    )


def _described(seen: _Clean) -> dict[str, Any]:
    """What the clean image says, under the names of Sensitivity."""
    return {
        "layer": seen.layer,
        "feature_map": seen.feature_map,
        "target": seen.target,
        "clean_class": seen.class_,
        "clean_probability": float(seen.probabilities[seen.target]),
        "clean_class_probability": float(seen.probabilities[seen.class_]),
        "clean_probabilities": seen.probabilities,
    }


def watched_layer(graph: Graph) -> str:
    """The convolution whose strongest map is watched: the last one before the classes, the paper's layer 5.

    Where a convolution gives the classes (SqueezeNet), its maps are the classes' own scores and show nothing besides;
    it is watched only where the network has no other. Raises: UnknownLayer where there is no convolution at all.
    """
    try:
        return last_hidden_convolution(graph, classes=True)
    except ValueError:
        return graph.last_convolution


class _Maps(NamedTuple):
    """What is noted of each of P positions."""

    activation: Tensor
    probability: Tensor
    top_class: Tensor
    probabilities: Tensor
    """[P, classes], or [P, 0] where they were not asked for."""


def _all_places(grid: Grid) -> Tensor:
    return torch.cartesian_prod(torch.arange(grid.rows), torch.arange(grid.cols))


def _mapped(
    occluded: Occluded, seen: _Clean, grid: Grid, refine: float, memory_bytes: int, all_probabilities: bool
) -> tuple[_Maps, Tensor]:
    """What is noted of every position, and the probabilities [classes] where the target's is lowest."""

    def measure(places: Tensor, all_probabilities: bool = all_probabilities) -> _Maps:
        return _measure(occluded, places, seen.target, memory_bytes, all_probabilities)

    places = _all_places(grid)
    unoccluded = (seen.activation, seen.probabilities[seen.target])
    maps = measure(places) if refine == 1 else _refined(measure, grid, refine, unoccluded)
    lowest = places[int(_first_largest(-maps.probability, 0))]
    return maps, measure(lowest[None], all_probabilities=True).probabilities[0]


def _measure(occluded: Occluded, places: Tensor, target: int, memory_bytes: int, all_probabilities: bool) -> _Maps:
    """At positions [P, 2], as rows and columns of the grid."""
    found: list[_Maps] = []
    order = []
    for index, sums, scores in occluded.run(places, memory_bytes):
        if not (sums.isfinite().all() and scores.isfinite().all()):
            raise ValueError("an occluded image gives activations or scores that are not finite numbers")
        probabilities = _probabilities(occluded.graph, scores)
        kept = probabilities[:, : probabilities.shape[1] if all_probabilities else 0]
        found.append(_Maps(sums, probabilities[:, target].clone(), _first_largest(scores, 1), kept.clone()))
        order.append(index)
    back = torch.cat(order).argsort().to(occluded.filled.device)
    return _Maps(*(torch.cat(parts)[back] for parts in zip(*found, strict=True)))


def _refined(measure: Callable[[Tensor], _Maps], grid: Grid, share: float, unoccluded: tuple[Tensor, Tensor]) -> _Maps:
    """A coarse grid, then the `share` of all positions where it says that most changes; the rest interpolated."""
    row_nodes, col_nodes = _nodes(grid)
    coarse = measure(torch.cartesian_prod(torch.tensor(row_nodes), torch.tensor(col_nodes)))
    by_row, by_col = _interpolation(grid.rows, row_nodes), _interpolation(grid.cols, col_nodes)

    def spread(values: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        """[coarse positions, ...] -> [positions, ...]."""
        rows, cols = (m.to(values.device, values.dtype) for m in (rows, cols))
        block = values.view(len(row_nodes), len(col_nodes), *values.shape[1:])
        return torch.einsum("ij,kl,jl...->ik...", rows, cols, block).flatten(0, 1)

    nearest = [F.one_hot(m.argmax(1), m.shape[1]).double() for m in (by_row, by_col)]
    maps = _Maps(
        spread(coarse.activation, by_row, by_col),
        spread(coarse.probability, by_row, by_col),
        spread(coarse.top_class.double(), *nearest).round().long(),
        spread(coarse.probabilities, by_row, by_col),
    )
    changes = [(m - clean).abs() for m, clean in zip(maps[:2], unoccluded, strict=True)]
    change = sum(c / c.max().clamp(min=torch.finfo(c.dtype).tiny) for c in changes)
    at_nodes = torch.zeros(grid.rows, grid.cols, dtype=torch.bool)
    at_nodes[torch.tensor(row_nodes)[:, None], torch.tensor(col_nodes)] = True
    order = torch.as_tensor(change).cpu().masked_fill(at_nodes.flatten(), -1).argsort(descending=True, stable=True)
    nodes = at_nodes.flatten().nonzero()[:, 0]
    chosen = order[: computed_positions(grid, share) - len(nodes)].sort().values
    for index, part in ((nodes, coarse), *(((chosen, measure(_all_places(grid)[chosen])),) if len(chosen) else ())):
        for onto, values in zip(maps, part, strict=True):
            onto[index.to(onto.device)] = values
    return maps


def _nodes(grid: Grid) -> tuple[list[int], list[int]]:
    """Rows and columns of the coarse grid: every fourth, and the last."""
    rows, cols = (sorted({*range(0, n, COARSE), n - 1}) for n in (grid.rows, grid.cols))
    return rows, cols


def computed_positions(grid: Grid, refine: float = 1.0) -> int:
    """How many of the grid's positions are computed; the rest is interpolated (`sensitivity`, its `refine`)."""
    every = grid.rows * grid.cols
    if refine == 1:
        return every
    coarse = math.prod(len(nodes) for nodes in _nodes(grid))
    return coarse + min(round(refine * every), every - coarse)


def _interpolation(length: int, nodes: list[int]) -> Tensor:
    """[length, nodes]: weights that make each place linear between its neighbouring nodes; both ends are nodes."""
    at, node = torch.arange(length).double(), torch.tensor(nodes)
    above = torch.searchsorted(node, torch.arange(length)).clamp(max=len(nodes) - 1)
    below = (above - 1).clamp(min=0)
    gap = (node[above] - node[below]).clamp(min=1)
    weight = ((at - node[below]) / gap).clamp(0, 1)
    return F.one_hot(below, len(nodes)) * (1 - weight)[:, None] + F.one_hot(above, len(nodes)) * weight[:, None]


def blurred(pixels: Tensor, sigma_px: float) -> Tensor:
    """An image [rows, cols, channels] under a Gaussian of `sigma_px` pixels, cut off at three sigma; the border is
    continued by its own pixels."""
    reach = max(1, round(3 * sigma_px))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=pixels.device) / sigma_px) ** 2)
    weights = (weights / weights.sum()).to(torch.float32)
    x = pixels.permute(2, 0, 1)[:, None].float()
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), weights.view(1, 1, 1, -1))
    x = F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), weights.view(1, 1, -1, 1))
    return x[:, 0].permute(1, 2, 0)


def _check_images(graph: Graph, clean: Tensor, filled: Tensor, grid: Grid) -> None:
    channels, rows, cols = graph.input_shape
    if (rows, cols) != (grid.input_px, grid.input_px):
        raise ValueError(f"the grid is for {grid.input_px} px a side; the network was traced for {rows} x {cols}")
    for name, image in (("clean", clean), ("filled", filled)):
        if tuple(image.shape) != (channels, rows, cols):
            raise ValueError(
                f"{name} has shape {tuple(image.shape)}; one image {channels} x {rows} x {cols} is expected"
            )


def _check_options(method: str, refine: float, memory_mb: float) -> None:
    if method not in ("incremental", "dense"):
        raise ValueError(f"method={method!r} was given; expected 'incremental' or 'dense'")
    if not 0 <= refine <= 1 or memory_mb <= 0:
        raise ValueError(f"refine={refine}, memory_mb={memory_mb} were given; expected 0 to 1, and more than 0")


def _check_scores(scores: Tensor, target: int | None) -> None:
    if scores.ndim != 2:
        raise ValueError(f"the network gives {tuple(scores.shape)} for one image; one row of class scores is expected")
    if target is not None and not 0 <= target < scores.shape[1]:
        raise ValueError(f"target={target} was given; the network has the classes 0 to {scores.shape[1] - 1}")
    if not scores.isfinite().all():
        raise ValueError("the clean image gives scores that are not finite numbers")


def _probabilities(graph: Graph, scores: Tensor) -> Tensor:
    """Softmax, unless the network ends in one; of half precision in float32."""
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return scores if graph.operations[graph.output].kind == "softmax" else scores.softmax(1)


def _first_largest(x: Tensor, dim: int) -> Tensor:
    """Index of the largest value, the smallest such index: argmax itself does not say which of equals it takes."""
    index = torch.arange(x.shape[dim], device=x.device).expand_as(x)
    return torch.where(x == x.amax(dim, keepdim=True), index, x.shape[dim]).amin(dim)
