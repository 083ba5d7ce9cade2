"""Occlusion sensitivity: which parts of an image the network's answer depends on.

Zeiler and Fergus, arXiv 1311.2901v3, Sec. 4.2 and Fig. 7 (ECCV 2014, Fig. 6): a grey square is slid over the image,
and for each of its positions are noted (b) the activation, summed over the map, of the feature map of the last
convolution that answers the unoccluded image most strongly, (d) the probability of the right class, (e) the most
probable class. All three come from the same forward passes here.

An occluder changes a window of every map and leaves the rest as it is for the clean image. So only that window is
computed, with a rim of unchanged neighbours around it, for many positions at once, until the windows cover most of the
map; the rest of the network is run whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.graph import Graph, Operation, Pair, average_counts


@dataclass(frozen=True)
class Grid:
    """Where the square goes: rows and columns 0, s, 2 s, ... while it fits whole into the image; in input pixels."""

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
    clean_class_probability: float
    """Probability of the most probable class for the unoccluded image."""
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
    clean_probabilities = _probabilities(graph, values[graph.output])[0]
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
        clean_probability=float(clean_probabilities[target]),
        clean_class_probability=float(clean_probabilities[clean_class]),
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
        axes = []
        for low, high, length in zip(first, last, shape[1:], strict=True):
            low, high = low.clamp(0, length - 1), high.clamp(0, length - 1)
            size = max(1, int((high - low).max()) + 1)
            axes.append((low, high, low.clamp(max=length - size), size))
        firsts, lasts, origins, sizes = zip(*axes, strict=True)
        return cls(firsts, lasts, origins, sizes)


class _Occluded:
    """The network on one image with a square over it, for many positions of the square at once."""

    def __init__(self, graph: Graph, clean: Tensor, filled: Tensor, grid: Grid, method: str):
        if method not in ("incremental", "dense"):
            raise ValueError(f"method={method!r} was given; expected 'incremental' or 'dense'")
        self.graph, self.filled, self.grid = graph, filled, grid
        self.local = {graph.input}
        for op in graph.operations.values() if method == "incremental" else ():
            if op.inputs and self.local.issuperset(op.inputs) and _is_local(graph, op):
                self.local.add(op.name)
        self.clean = graph.run(clean[None], self.local)
        self._whole: set[str] = set()

    @property
    def dense_from(self) -> str:
        """The first operation that was run whole for any position so far."""
        first = next(name for name in self.graph.operations if name in self._whole)
        only_input = self.local == {self.graph.input}
        return self.graph.input if only_input else first

    @torch.no_grad()
    def run(self, tops_lefts: Tensor, activation: str, feature_map: int) -> tuple[Tensor, Tensor]:
        """For squares at [P, 2] (top, left): one map [P, rows, cols] of `activation`, and scores [P, classes]."""
        needed = self.graph.ancestors([activation, self.graph.output])
        ranges = self._ranges(tops_lefts, needed)
        whole = [name for name in needed if name not in ranges]
        self._whole.update(name for name in whole if self.graph.operations[name].kind != "value")
        border = {source for name in whole for source in self.graph.operations[name].inputs if source in ranges}
        given, maps = {}, None
        for name, windows in self._windows(ranges):
            if name in border:
                given[name] = self._pasted(self.clean[name], windows, ranges[name])
            if name == activation:
                one = slice(feature_map, feature_map + 1)
                maps = self._pasted(self.clean[name][:, one], windows[:, one], ranges[name])[:, 0]
        wanted = [self.graph.output] if maps is not None else [activation, self.graph.output]
        values = self.graph.run_from(given, wanted)
        return values[activation][:, feature_map] if maps is None else maps, values[self.graph.output]

    def _ranges(self, tops_lefts: Tensor, needed: Sequence[str]) -> dict[str, _Range]:
        """What changes of every operation that is worth computing in windows, in order."""
        tops, lefts = tops_lefts.unbind(1)
        last = self.grid.occluder_px - 1
        square = _Range.within((tops, lefts), (tops + last, lefts + last), self.graph.input_shape)
        ranges = {self.graph.input: square}
        for op in (self.graph.operations[name] for name in needed if name in self.local):
            if op.inputs and all(source in ranges for source in op.inputs):
                changed = _changed_by(op, [ranges[source] for source in op.inputs])
                if changed.size[0] * changed.size[1] <= MOSTLY * op.shape[1] * op.shape[2]:
                    ranges[op.name] = changed
        return ranges

    def _windows(self, ranges: Mapping[str, _Range]) -> Iterator[tuple[str, Tensor]]:
        """The changed windows [P, maps, rows, cols] of every operation of `ranges`; let go after their last use."""
        operations = self.graph.operations
        last_use = {source: name for name in ranges for source in operations[name].inputs}
        size, square = self.grid.occluder_px, ranges[self.graph.input]
        corners = zip(square.origin[0].tolist(), square.origin[1].tolist(), strict=True)
        cut = [self.filled[:, top : top + size, left : left + size] for top, left in corners]
        windows = {self.graph.input: torch.stack(cut)}
        yield self.graph.input, windows[self.graph.input]
        for name in list(ranges)[1:]:
            op = operations[name]
            result = self._compute(op, windows, ranges)
            for source in set(op.inputs):
                if last_use[source] == name:
                    del windows[source]
            if name in last_use:
                windows[name] = result
            yield name, result

    def _compute(self, op: Operation, windows: Mapping[str, Tensor], ranges: Mapping[str, _Range]) -> Tensor:
        """One operation on its changed windows, its inputs filled up with the clean image around them."""
        wanted = ranges[op.name]
        if op.pointwise:
            same = [ranges[source] is wanted for source in op.inputs]
            pairs = zip(op.inputs, same, strict=True)
            result: Tensor = op.compute(
                *(windows[n] if ok else self._surrounded(n, windows[n], ranges[n], wanted) for n, ok in pairs)
            )
            return result
        assert op.window is not None
        source, window = op.inputs[0], op.window
        origin = [o * s - p for o, s, p in zip(wanted.origin, window.stride, window.pad_before, strict=True)]
        rows, cols = ((n - 1) * s + m for n, s, m in zip(wanted.size, window.stride, window.span, strict=True))
        region = wanted._replace(origin=(origin[0], origin[1]), size=(rows, cols))
        fill = -torch.inf if op.kind == "maxpool" else 0.0
        x = self._surrounded(source, windows[source], ranges[source], region, fill)
        return _slide(op, x, wanted, self.graph.operations[source].shape)

    def _surrounded(self, name: str, windows: Tensor, there: _Range, wanted: _Range, fill: float = 0.0) -> Tensor:
        """The windows `wanted`: the clean image's values, over them what changed, and `fill` beside the map."""
        clean = self.clean[name][0]
        result = windows.new_full((len(windows), windows.shape[1], *wanted.size), fill)
        corners = [torch.stack(r.origin, 1).tolist() for r in (wanted, there)]
        for p, (corner, changed) in enumerate(zip(*corners, strict=True)):
            _paste(result[p], corner, clean, (0, 0))
            _paste(result[p], corner, windows[p], changed)
        return result

    def _pasted(self, clean: Tensor, windows: Tensor, there: _Range) -> Tensor:
        """Whole maps [P, maps, rows, cols]: the clean image's, with the changed windows over them."""
        result = clean.repeat(len(windows), 1, 1, 1)
        for p, corner in enumerate(torch.stack(there.origin, 1).tolist()):
            _paste(result[p], (0, 0), windows[p], corner)
        return result


def _is_local(graph: Graph, op: Operation) -> bool:
    """A square of changed input changes a square of its output."""
    if len(op.shape) != 3:
        return False
    if op.pointwise:
        return all(graph.operations[source].shape[1:] == op.shape[1:] for source in op.inputs)
    return op.window is not None


def _changed_by(op: Operation, inputs: Sequence[_Range]) -> _Range:
    """From what changes of the inputs to what changes of the output."""
    if op.window is None:
        if all(other is inputs[0] for other in inputs):
            return inputs[0]
        first = [torch.stack(firsts).amin(0) for firsts in zip(*(r.first for r in inputs), strict=True)]
        last = [torch.stack(lasts).amax(0) for lasts in zip(*(r.last for r in inputs), strict=True)]
        return _Range.within(first, last, op.shape)
    first, last = [], []
    for axis, (low, high) in enumerate(zip(inputs[0].first, inputs[0].last, strict=True)):
        stride, before = op.window.stride[axis], op.window.pad_before[axis]
        reach = low + before - op.window.span[axis] + 1
        first.append(-torch.div(-reach, stride, rounding_mode="floor"))
        last.append(torch.div(high + before, stride, rounding_mode="floor"))
    return _Range.within(first, last, op.shape)


def _slide(op: Operation, x: Tensor, wanted: _Range, map_shape: Sequence[int]) -> Tensor:
    """A convolution or pool over windows that hold their padding already."""
    assert op.window is not None
    window, module = op.window, op.module
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, module.weight, module.bias, window.stride, 0, window.dilation, module.groups)
    if op.kind == "maxpool":
        return F.max_pool2d(x, window.kernel, window.stride, 0, window.dilation)
    if op.kind == "pad":
        return x
    sums = F.avg_pool2d(x, window.kernel, window.stride, divisor_override=1)
    for axis, count in enumerate(average_counts(op, map_shape)):
        index = wanted.origin[axis][:, None] + torch.arange(wanted.size[axis])
        share = count[index].to(x.device, x.dtype)
        sums = sums / (share[:, None, :, None] if axis == 0 else share[:, None, None, :])
    return sums


def _paste(onto: Tensor, onto_corner: Sequence[int], values: Tensor, corner: Sequence[int]) -> None:
    """Write values [maps, rows, cols] onto another window of the same map, where the two overlap."""
    overlaps = []
    for axis, (a, b) in enumerate(zip(onto_corner, corner, strict=True), start=1):
        first, end = max(a, b), min(a + onto.shape[axis], b + values.shape[axis])
        if first >= end:
            return
        overlaps.append((slice(first - a, end - a), slice(first - b, end - b)))
    (onto_rows, rows), (onto_cols, cols) = overlaps
    onto[:, onto_rows, onto_cols] = values[:, rows, cols]
