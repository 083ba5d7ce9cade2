"""A network on one image of which a rectangle is changed, for many rectangles: only what changes is computed.

A changed rectangle of the image changes a window of every map and leaves the rest as it is for the clean image. So only
that window is computed, with a rim of unchanged neighbours around it, for many positions at once. How far this goes is
chosen by counted multiply-adds: every operation costs so many in its window and so many on the whole map, and the
network is cut where the sum is least; from there on it is run whole. An operation that is not understood is run whole,
and so is all that depends on it.

What changes along one axis follows from the position along that axis alone. So the geometry is worked out for rows and
columns apart, and positions whose windows have about the same sizes are run together: no window is much larger than it
has to be. (Near the border of the image windows are cut off; for ZFNet that alone saves a fourth of the work.)

Maps are kept with the feature maps innermost ("channels last"). So a cell is one run of memory, putting a window into
its surroundings is a copy of runs, and convolutions are at their fastest.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.graph import Graph, Operation, Pair, average_counts

ELEMENT = 16
"""Multiply-adds that take about as long as moving one element of a map (measured on a CPU; nothing hangs on it)."""
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

    def multiply_adds(self) -> tuple[float, float]:
        """Of the network at all pairs of places: run whole, and in windows as small as each pair allows."""
        positions = math.prod(len(axis.first) for axis in self.changes[self.graph.input])
        whole = windows = 0.0
        for op in self.needed:
            cells = positions * math.prod(op.shape[1:])
            whole += _multiply_adds(op) * cells
            if op.name in self.changes:
                cells = math.prod(int(axis.sizes.sum()) for axis in self.changes[op.name])
            windows += _multiply_adds(op) * cells
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


class Occluded:
    """One image, with the occluder at any of its places."""

    def __init__(self, plan: Incremental, clean: Tensor, filled: Tensor, feature_map: int):
        """`clean` [channels, rows, cols] is the image as the network takes it; occluders show `filled`, of the same
        shape. `feature_map` is the one whose activation is summed."""
        self.plan, self.graph, self.feature_map = plan, plan.graph, feature_map
        self.whole: set[str] = set()
        """The operations that were run whole for any position."""
        read = {source for name in plan.changes for source in self.graph.operations[name].inputs}
        kept = [n for n in plan.changes if n in read or any(u not in plan.changes for u in self.graph.users[n])]
        values = self.graph.run(clean[None], {*kept, self.graph.input, *({plan.wanted} & plan.changes.keys())})
        self.cells = {name: _cells(value) for name, value in values.items()}
        self.filled = filled.permute(1, 2, 0).reshape(-1, len(filled))
        self.changes = {
            name: (rows.to(clean.device), cols.to(clean.device)) for name, (rows, cols) in plan.changes.items()
        }
        self.weights = {
            op.name: op.module.weight.contiguous(memory_format=torch.channels_last)
            for op in plan.needed
            if op.kind == "conv" and isinstance(op.module, nn.Conv2d)
        }
        self.instead = {op.name: self._as_fast_as_can_be(op) for op in plan.needed if op.kind in ("conv", "linear")}

    def _as_fast_as_can_be(self, op: Operation) -> Callable[[Tensor], Tensor]:
        """A convolution or linear operation on whole maps."""
        module = op.module
        if isinstance(module, nn.Linear):
            return _linear(module)
        assert isinstance(module, nn.Conv2d)
        weight = self.weights[op.name]
        return lambda x: F.conv2d(x, weight, module.bias, module.stride, module.padding, module.dilation, module.groups)

    @property
    def dense_from(self) -> str:
        """The first operation that was run whole; the input where nothing was computed in windows."""
        if len(self.plan.changes) == 1:
            return self.graph.input
        return next(op.name for op in self.plan.needed if op.name in self.whole)

    @torch.no_grad()
    def run(self, places: Tensor, memory_bytes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions [P, 2], as places along rows and columns: so many at a time that they fit into memory.

        Yields which of the positions [B], the sum of the wanted map [B], and the network's output [B, classes].
        """
        waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        itemsize = self.filled.element_size()
        for group in self.plan.groups(places):
            together = max(1, memory_bytes // (group.elements * itemsize))
            for index in torch.arange(len(group.index)).split(together):
                rows, cols = (axis[index].to(self.filled.device) for axis in group.places)
                waiting.append((group.index[index], *self._batch(rows, cols, group.sizes)))
                if sum(neck.nbytes for _, _, neck in waiting) * 4 > memory_bytes:
                    yield self._finish(waiting)
        if waiting:
            yield self._finish(waiting)

    def _finish(self, waiting: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """From the neck on, where there are no maps any more: many batches at a time, which spares reading weights."""
        index, sums, neck = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        waiting.clear()
        output = self.graph.output
        return index, sums, self.graph.run_from({self.plan.neck: neck}, [output], self.instead)[output]

    def _batch(self, rows: Tensor, cols: Tensor, sizes: Mapping[str, Pair]) -> tuple[Tensor, Tensor]:
        """The sum of the wanted map [B], and the values at the neck [B, units]."""
        batch = _Batch(self, rows, cols, sizes)
        whole = [op for op in self.plan.ancestors if op.name not in sizes]
        self.whole.update(op.name for op in whole if op.kind != "value")
        border = {source for op in whole for source in op.inputs if source in sizes}
        given: dict[str, Tensor] = {}
        sums = None
        for name in sizes:
            batch.compute(name)
            if name in border:
                given[name] = batch.whole(name)
            if name == self.plan.wanted:
                sums = batch.whole(name, self.feature_map).sum((1, 2, 3))
            batch.let_go(name)
        wanted = [self.plan.neck] if sums is not None else [self.plan.wanted, self.plan.neck]
        values = self.graph.run_from(given, wanted, self.instead)
        if sums is None:
            sums = values[self.plan.wanted][:, self.feature_map].sum((1, 2))
        return sums, values[self.plan.neck]


class _Batch:
    """The windows of some positions, from operation to operation."""

    def __init__(self, image: Occluded, rows: Tensor, cols: Tensor, sizes: Mapping[str, Pair]):
        self.image, self.places, self.sizes = image, (rows, cols), sizes
        self.windows: dict[str, Tensor] = {}
        operations = image.graph.operations
        self.last_use = {source: name for name in sizes for source in operations[name].inputs}

    def origins(self, name: str) -> tuple[Tensor, Tensor]:
        """First row and first column of the windows of an operation; [B] each."""
        axes = zip(self.image.changes[name], self.places, self.sizes[name], strict=True)
        rows, cols = (axis.origins(places, size) for axis, places, size in axes)
        return rows, cols

    def compute(self, name: str) -> None:
        """The windows of one operation, from those of its inputs."""
        graph = self.image.graph
        op = graph.operations[name]
        if name == graph.input:
            return
        origins, size = self.origins(name), self.sizes[name]
        if op.pointwise:
            same = [
                s in self.windows and self.image.plan.changes[s] is self.image.plan.changes[name] for s in op.inputs
            ]
            pairs = zip(op.inputs, same, strict=True)
            values = [self.windows[s] if ok else self.gather(s, origins, size) for s, ok in pairs]
            self.windows[name] = op.compute(*values)
            return
        assert op.window is not None
        window = op.window
        rows, cols = (o * s - p for o, s, p in zip(origins, window.stride, window.pad_before, strict=True))
        fill = -torch.inf if op.kind == "maxpool" else 0.0
        x = self.gather(op.inputs[0], (rows, cols), _reach(op, size), fill)
        self.windows[name] = self._slide(op, x, origins)

    def let_go(self, name: str) -> None:
        """Of the windows that nothing reads after this operation."""
        for source in (*self.image.graph.operations[name].inputs, name):
            if self.last_use.get(source, name) == name:
                self.windows.pop(source, None)

    def whole(self, name: str, feature_map: int | None = None) -> Tensor:
        """Whole maps [B, maps, rows, cols]: the clean image's with the changed windows in them."""
        first = torch.zeros_like(self.places[0])
        rows, cols = self.image.graph.operations[name].shape[1:]
        return self.gather(name, (first, first), (rows, cols), feature_map=feature_map)

    def gather(
        self,
        name: str,
        origins: tuple[Tensor, Tensor],
        size: Pair,
        fill: float = 0.0,
        feature_map: int | None = None,
    ) -> Tensor:
        """Any windows of an operation's output: what changed, around it the clean image's, beside the map `fill`.

        The clean map's cells, two cells of fill and the changed windows' cells make one table of cells; a window is a
        choice of its rows.
        """
        image = self.image
        clean = image.cells[name]
        changes = image.changes[name]
        shape = image.graph.operations[name].shape
        beside = shape[1] * shape[2] + (fill != 0)
        if name == image.graph.input:
            changed = image.filled
            starts, steps = (torch.zeros_like(self.places[0]),) * 2, (shape[2], 1)
            bounds = [(axis.first[at], axis.last[at]) for axis, at in zip(changes, self.places, strict=True)]
            block = 0
        else:
            windows = self.windows[name]
            changed = windows.permute(0, 2, 3, 1).flatten(0, 2)
            starts, (height, width) = self.origins(name), self.sizes[name]
            steps, block = (width, 1), height * width
            bounds = [(o, o + n - 1) for o, n in zip(starts, (height, width), strict=True)]
        if feature_map is not None:
            clean, changed = clean[:, feature_map, None], changed[:, feature_map, None]
        index = _index(origins, size, starts, steps, bounds, block, shape, len(clean), beside)
        table = torch.cat([clean, changed])
        chosen = table.index_select(0, index.flatten())
        return chosen.view(len(index), *size, -1).permute(0, 3, 1, 2)

    def _slide(self, op: Operation, x: Tensor, origins: tuple[Tensor, Tensor]) -> Tensor:
        """A convolution or pool over windows that hold their padding already."""
        assert op.window is not None
        window, module = op.window, op.module
        if isinstance(module, nn.Conv2d):
            weight = self.image.weights[op.name]
            return F.conv2d(x, weight, module.bias, window.stride, 0, window.dilation, module.groups)
        if op.kind == "maxpool":
            return F.max_pool2d(x, window.kernel, window.stride, 0, window.dilation)
        if op.kind == "pad":
            return x
        sums = F.avg_pool2d(x, window.kernel, window.stride, divisor_override=1)
        counts = average_counts(op, self.image.graph.operations[op.inputs[0]].shape)
        for axis, (count, origin) in enumerate(zip(counts, origins, strict=True)):
            at = origin[:, None] + torch.arange(self.sizes[op.name][axis], device=x.device)
            share = count.to(x.device, x.dtype)[at]
            sums = sums / (share[:, None, :, None] if axis == 0 else share[:, None, None, :])
        return sums


def _index(
    origins: Sequence[Tensor],
    size: Pair,
    starts: Sequence[Tensor],
    steps: Pair,
    bounds: Sequence[tuple[Tensor, Tensor]],
    block: int,
    shape: Sequence[int],
    offset: int,
    beside: int,
) -> Tensor:
    """[B, rows, cols]: for each cell of the windows asked for, its row in the table of cells."""
    clean, changed, outside, inside = [], [], [], []
    for axis in (0, 1):
        at = origins[axis][:, None] + torch.arange(size[axis], device=origins[axis].device)
        first, last = bounds[axis]
        outside.append((at < 0) | (at >= shape[1 + axis]))
        inside.append((at >= first[:, None]) & (at <= last[:, None]))
        clean.append((at * (shape[2], 1)[axis]).int())
        changed.append(((at - starts[axis][:, None]) * steps[axis]).int())
    number = torch.arange(len(origins[0]), dtype=torch.int32, device=origins[0].device)
    changed[0] += number[:, None] * block + offset
    rows, cols = (lambda pair: pair[0][:, :, None]), (lambda pair: pair[1][:, None, :])
    index = (rows(clean) + cols(clean)).masked_fill(rows(outside) | cols(outside), beside)
    return torch.where(rows(inside) & cols(inside), rows(changed) + cols(changed), index)


def _cells(value: Tensor) -> Tensor:
    """The cells of one map [1, maps, rows, cols] as rows, and after them a cell of zeros and one of minus infinity."""
    cells = value[0].permute(1, 2, 0).reshape(-1, value.shape[1])
    return torch.cat([cells, cells.new_zeros(1, cells.shape[1]), cells.new_full((1, cells.shape[1]), -torch.inf)])


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


def _reach(op: Operation, size: Pair) -> Pair:
    """Input rows and columns that a window of the output reads."""
    assert op.window is not None
    rows, cols = ((n - 1) * s + m for n, s, m in zip(size, op.window.stride, op.window.span, strict=True))
    return rows, cols


def _read(op: Operation, size: Pair) -> int:
    """Elements that are put together for a window of the output; none where windows are read as they are."""
    if op.window is None:
        return 0
    maps = op.module.in_channels if isinstance(op.module, nn.Conv2d) else op.shape[0]
    return maps * math.prod(_reach(op, size))


def _multiply_adds(op: Operation) -> float:
    """Of one output cell, all its feature maps; of a linear operation, all its units."""
    return float(op.module.weight.numel()) if isinstance(op.module, nn.Conv2d | nn.Linear) else 0.0


def _cost(op: Operation, cells: int) -> float:
    """Of so many output cells, in multiply-adds and what takes as long."""
    return (_multiply_adds(op) + ELEMENT * op.shape[0]) * cells


def _linear(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The same sum as a convolution whose window is the whole map: on CPUs that library uses the wider vectors
    (measured on 64 x 9216 -> 4096, one core: 91 against 45 thousand million multiply-adds a second)."""

    def compute(x: Tensor) -> Tensor:
        side = next((side for side in (8, 6, 7, 5, 4) if module.in_features % (16 * side**2) == 0), 0)
        if x.device.type != "cpu" or x.dtype != torch.float32 or not side:
            return F.linear(x, module.weight, module.bias)
        shape = (-1, side, side, module.in_features // side**2)
        x, weight = (t.reshape(shape).permute(0, 3, 1, 2) for t in (x, module.weight))
        return F.conv2d(x, weight, module.bias).flatten(1)

    return compute
