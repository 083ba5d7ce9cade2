"""What of a network has to be computed for an image of which a rectangle is changed, for many rectangles.

A changed rectangle of the image changes a window of every map and leaves the rest as it is for the clean image. So only
that window is computed, with a rim of unchanged neighbours around it, for many positions at once. How far this goes is
chosen by counted multiply-adds: every operation costs so many in its window and so many on the whole map, and the
network is cut where the sum is least; from there on it is run whole. An operation that is not understood is run whole,
and so is all that depends on it.

What changes along one axis follows from the position along that axis alone. So the geometry is worked out for rows and
columns apart, and positions whose windows have about the same sizes are run together: no window is much larger than it
has to be. (Near the border of the image windows are cut off; for ZFNet that alone saves a fourth of the work.)
`zfnet.occluded` runs what is planned here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from zfnet.graph import Graph, Operation, Pair

ELEMENT = 16
"""Multiply-adds that take about as long as moving one element of a map (measured on a CPU). One number for every
machine, as it decides where the network is cut: results are the same beside rounding, but `dense_from` is stored."""
START = 3e6
"""Multiply-adds that take about as long as starting one operation: below this, positions are better run together."""


@dataclass(frozen=True, eq=False)
class Axis:
    """What changes of a map along one axis: for each of n places of the occluder the first and the last cell."""

    first: Tensor
    last: Tensor
    length: int
    """Of the map, along this axis."""

    @classmethod
    def within(cls, first: Tensor, last: Tensor, length: int) -> "Axis":
        """Cut to the map."""
        return cls(first.clamp(0, length - 1), last.clamp(0, length - 1), length)

    @property
    def sizes(self) -> Tensor:
        """[n]: cells; at least one, though a stride may step over the occluder."""
        return (self.last - self.first + 1).clamp(min=1)

    def to(self, device: torch.device) -> "Axis":
        """The same on a device."""
        return Axis(self.first.to(device), self.last.to(device), self.length)

    def origins(self, places: Tensor, size: int) -> Tensor:
        """First cell of a window of `size` cells, inside the map, that holds what changes; for each of `places`."""
        return self.first[places].clamp(max=self.length - size)


Change = tuple[Axis, Axis]


@dataclass(frozen=True, eq=False)
class Group:
    """Positions that run together: in every operation their windows have one size."""

    index: Tensor
    """[P]: which positions."""
    places: tuple[Tensor, Tensor]
    """[P] each: their places along the rows and along the columns."""
    sizes: Mapping[str, Pair]
    """Rows and columns of the windows, for the operations that are computed in windows."""
    elements: int
    """The most numbers that are held for one position at a time."""


class Incremental:
    """How a network is run for an occluder at many places; made once for all images."""

    def __init__(self, graph: Graph, places: Change, wanted: str, windows: bool = True):
        """`places` are the occluder's along rows and columns, in input pixels; `wanted` is the operation of which one
        map is summed, besides the network's output. `windows=False` runs every operation whole."""
        self.graph, self.wanted = graph, wanted
        self.ancestors = [graph.operations[name] for name in graph.ancestors([wanted, graph.output])]
        self.needed = [op for op in self.ancestors if op.kind != "value"]
        self.changes: dict[str, Change] = {graph.input: places}
        for op in self.needed if windows else ():
            if op.inputs and all(source in self.changes for source in op.inputs) and _is_local(graph, op):
                self.changes[op.name] = _changed_by(op, [self.changes[source] for source in op.inputs])
        self.neck = self._neck()

    def _neck(self) -> str:
        """The first operation without rows and columns through which alone the output sees the image."""
        flat = (op.name for op in self.needed if len(op.shape) == 1)
        cuts = (name for name in flat if self.graph.input not in self.graph.ancestors([self.graph.output], [name]))
        return next(cuts, self.graph.output)

    def multiply_adds(self) -> tuple[int, int]:
        """Of the network at all pairs of places: run whole, and in windows as small as each pair allows."""
        positions = math.prod(len(axis.first) for axis in self.changes[self.graph.input])
        whole = windows = 0
        for op in self.needed:
            cells = positions * math.prod(op.shape[1:])
            whole += op.multiply_adds(cells)
            if op.name in self.changes:
                cells = math.prod(int(axis.sizes.sum()) for axis in self.changes[op.name])
            windows += op.multiply_adds(cells)
        return whole, windows

    def groups(self, places: Tensor) -> list[Group]:
        """The positions [P, 2], as places along rows and columns, in groups; each has its own cut to whole maps."""
        (row_class, row_sizes), (col_class, col_sizes) = self._classes(0), self._classes(1)
        group_of = row_class[places[:, 0]] * len(col_sizes) + col_class[places[:, 1]]
        found = []
        for number in group_of.unique().tolist():
            index = (group_of == number).nonzero()[:, 0]
            pairs = zip(row_sizes[number // len(col_sizes)], col_sizes[number % len(col_sizes)], strict=True)
            sizes = self._cut(dict(zip(self.changes, pairs, strict=True)))
            rows, cols = places[index].unbind(1)
            found.append(Group(index, (rows, cols), sizes, self._elements(sizes)))
        return found

    def _classes(self, axis: int) -> tuple[Tensor, list[list[int]]]:
        """For each place along the axis its class, and for each class the size of its window in every operation.

        Two classes are merged as long as their larger windows cost less than the batches that are saved.
        """
        sizes = torch.stack([change[axis].sizes for change in self.changes.values()], 1).double()
        other = torch.stack([change[1 - axis].sizes for change in self.changes.values()], 1).double()
        cells = [_cost(self.graph[name], 1) for name in self.changes]
        weight = torch.tensor(cells, dtype=torch.float64) * other.sum(0)
        saved = START * len(self.needed) * len(other.unique(dim=0))
        classes, class_of, count = sizes.unique(dim=0, return_inverse=True, return_counts=True)
        while len(classes) > 1:
            larger = torch.maximum(classes[:, None], classes[None])
            rise = (larger - classes[:, None]) @ weight * count[:, None]
            rise = (rise + rise.T).fill_diagonal_(torch.inf)
            if rise.min() > saved:
                break
            a, b = sorted(divmod(int(rise.argmin()), len(classes)))
            classes[a], count[a] = larger[a, b], count[a] + count[b]
            class_of = torch.where(class_of == b, a, class_of - (class_of > b).long())
            kept = torch.arange(len(classes)) != b
            classes, count = classes[kept], count[kept]
        return class_of, classes.long().tolist()

    def _cut(self, sizes: Mapping[str, Pair]) -> dict[str, Pair]:
        """The sizes of the operations that are worth computing in windows: those up to the cheapest cut."""
        order = {op.name: i for i, op in enumerate(self.needed)}
        gain = [0.0] * len(order)  # of cutting behind this operation, over cutting before it
        for name, size in sizes.items():
            op, i = self.graph[name], order[name]
            if op.inputs:
                gain[i] += _cost(op, math.prod(op.shape[1:])) - _cost(op, math.prod(size)) - ELEMENT * _read(op, size)
            whole = ELEMENT * math.prod(op.shape)  # put together, once, until all who read it do so in windows
            readers = [order[user] if user in sizes else len(order) for user in self.graph.users[name] if user in order]
            gain[i] -= whole
            if readers and max(readers) < len(order):
                gain[max(readers)] += whole
        gains = list(accumulate(gain))
        best = max(range(len(gains)), key=gains.__getitem__)
        return {name: size for name, size in sizes.items() if order[name] <= best}

    def _elements(self, sizes: Mapping[str, Pair]) -> int:
        """The most numbers that are held for one position at a time."""
        own = {op.name: math.prod((*op.shape[:1], *sizes.get(op.name, op.shape[1:]))) for op in self.needed}
        last_use = {source: op.name for op in self.needed for source in op.inputs}
        held, most = 0, 0
        for op in self.needed:
            work = 4 * own[op.name] if op.kind in ("normalisation", "unknown") else own[op.name]
            for source in op.inputs if op.name in sizes else ():
                work += own[source] + 2 * max(_read(op, sizes[op.name]), own[op.name])  # beside its surroundings
            if op.name not in sizes:
                work += sum(2 * math.prod(self.graph[source].shape) for source in op.inputs if source in sizes)
            most = max(most, held + work)
            held += own[op.name] - sum(own.get(s, 0) for s in set(op.inputs) if last_use[s] == op.name)
        return most


def _is_local(graph: Graph, op: Operation) -> bool:
    """A rectangle of changed input changes a rectangle of its output."""
    if len(op.shape) != 3:
        return False
    if op.pointwise:
        return all(graph.operations[source].shape[1:] == op.shape[1:] for source in op.inputs)
    return op.window is not None


def _changed_by(op: Operation, inputs: Sequence[Change]) -> Change:
    """From what changes of the inputs to what changes of the output."""
    if op.window is None:
        if all(other is inputs[0] for other in inputs):
            return inputs[0]
        rows, cols = (
            Axis(
                torch.stack([axis.first for axis in axes]).amin(0),
                torch.stack([axis.last for axis in axes]).amax(0),
                axes[0].length,
            )
            for axes in zip(*inputs, strict=True)
        )
        return rows, cols
    window, through = op.window, []
    for i, axis in enumerate(inputs[0]):
        stride, before, span = window.stride[i], window.pad_before[i], window.span[i]
        first = -torch.div(-(axis.first + before - span + 1), stride, rounding_mode="floor")
        last = torch.div(axis.last + before, stride, rounding_mode="floor")
        through.append(Axis.within(first, last, op.shape[1 + i]))
    return through[0], through[1]


def _read(op: Operation, size: Pair) -> int:
    """Elements that are put together for a window of the output; none where windows are read as they are."""
    if op.window is None:
        return 0
    maps = op.module.in_channels if isinstance(op.module, nn.Conv2d) else op.shape[0]
    return maps * math.prod(op.window.reach(size))


def _cost(op: Operation, cells: int) -> int:
    """Of so many output cells, in multiply-adds and what takes as long."""
    return op.multiply_adds(cells) + ELEMENT * op.shape[0] * cells
