"""A network on one image of which a rectangle is changed, for many rectangles: only what changes is computed.

`zfnet.incremental` plans which windows are computed and from where on the network is run whole; here that is done, for
many positions at once.

Maps are kept with the feature maps innermost ("channels last"). So a cell is one run of memory, putting a window into
its surroundings is a copy of runs, and convolutions are at their fastest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.graph import Operation, Pair, average_counts
from zfnet.incremental import Incremental


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
        x = self.gather(op.inputs[0], (rows, cols), window.reach(size), fill)
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


VECTOR = 16
"""Channels that a convolution takes at a time on a CPU, as numbers of float32."""
SIDES = (8, 7, 6, 5, 4)
"""Of the map that a linear layer's input is taken for, the first that leaves whole vectors of channels.

Measured on one AVX-512 core, in thousand million multiply-adds a second: 81 to 107 on maps of 8, 7 and 6, where a
product has 39 to 49; but 8 to 19 on those of 5 and 4. They stay: without them results would be rounded otherwise."""


def _linear(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    """On CPUs, the same sum as a convolution whose window is the whole map: that library uses the wider vectors."""
    side = next((side for side in SIDES if module.in_features % (VECTOR * side**2) == 0), None)

    def compute(x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or side is None:
            return F.linear(x, module.weight, module.bias)
        shape = (-1, side, side, module.in_features // side**2)
        x, weight = (t.reshape(shape).permute(0, 3, 1, 2) for t in (x, module.weight))
        return F.conv2d(x, weight, module.bias).flatten(1)

    return compute
