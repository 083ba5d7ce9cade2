"""The way up of a projection: forward passes that keep what the way down needs, of whole images or of windows alone.

An image in which few cells are to be projected need not be run whole: what a cell's projection passes through on the
way down is all that its activation is computed from, so the same windows are carried up. Beside the map is what the
whole image has there: zeros for filters and averages, nothing that could win for max pools. The switches are those of
the whole image.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.descent import Semantics
from zfnet.graph import Graph, Operation, Pair, average_counts
from zfnet.receptive import ReceptiveField, beneath
from zfnet.windows import Windows

Keep = dict[str, Tensor]
"""Per max pool its switches, per ReLU where it was positive, per normalisation its input; those that are needed."""


def run_whole(
    graph: Graph, images: Tensor, targets: Sequence[str], semantics: Semantics
) -> tuple[dict[str, Tensor], Keep]:
    """Run images [N, channels, rows, cols] forward: the outputs of the targets, and what was kept of whole maps."""
    kept: Keep = {}
    instead = {name: _keeping(graph.operations[name], semantics, kept) for name in graph.ancestors(targets)}
    return graph.run(images, set(targets), {name: run for name, run in instead.items() if run}), kept


def _keeping(op: Operation, semantics: Semantics, kept: Keep) -> Callable[[Tensor], Tensor] | None:
    """How the operation computes and keeps what its way down needs; None where it needs nothing."""

    def compute(x: Tensor) -> Tensor:
        if op.kind == "maxpool":
            assert isinstance(op.module, nn.MaxPool2d)
            assert op.window is not None
            pooled, kept[op.name] = _pool_with_switches(op, x, op.window.pad_before, op.module.ceil_mode)
            return pooled
        y: Tensor = op.compute(x)
        kept[op.name] = _kept_of(op, x, y)
        return y

    return compute if _needed(op, semantics) else None


def _needed(op: Operation, semantics: Semantics) -> bool:
    return (
        op.kind == "maxpool"
        or (op.kind == "relu" and semantics.relu != "deconvnet")
        or (op.kind == "normalisation" and semantics.normalisation == "gradient")
    )


def _kept_of(op: Operation, x: Tensor, y: Tensor) -> Tensor:
    return y > 0 if op.kind == "relu" else x


def _pool_with_switches(op: Operation, x: Tensor, padding: Pair, ceil: bool) -> tuple[Tensor, Tensor]:
    """Max pooling, and per output cell which position of its window holds the maximum, counted row by row.

    Positions inside the window, and not on the map as torch counts them, stay true when a window is cut out.
    """
    assert op.window is not None
    window = op.window
    y, index = F.max_pool2d(x, window.kernel, window.stride, padding, window.dilation, ceil, return_indices=True)
    rows = torch.arange(y.shape[-2], device=x.device)[:, None] * window.stride[0] - padding[0]
    cols = torch.arange(y.shape[-1], device=x.device) * window.stride[1] - padding[1]
    row = index.div(x.shape[-1], rounding_mode="floor")
    down = (row - rows) // window.dilation[0]
    right = (index - row * x.shape[-1] - cols) // window.dilation[1]
    positions = window.kernel[0] * window.kernel[1]
    switches = down.mul_(window.kernel[1]).add_(right)
    kind = torch.uint8 if positions < 256 else torch.int32
    return y, switches.to(kind, memory_format=torch.channels_last)


def run_windows(
    graph: Graph,
    images: Tensor,
    target: str,
    plan: Mapping[str, ReceptiveField],
    windows: Windows,
    semantics: Semantics,
) -> tuple[Tensor, Keep]:
    """Run what the cells `windows` of `target` see, and nothing else.

    `plan` has of every operation beneath the window that is carried. Returns the target's windows [M, maps, rows,
    cols], and what was kept of the planned windows.
    """
    ascent = _Ascent(graph, plan, windows, semantics)
    needed = graph.ancestors([target])
    last_use = {source: name for name in needed for source in graph.operations[name].inputs}
    values = {graph.input: windows.cut(images, plan[graph.input])}
    for name in needed:
        op = graph.operations[name]
        if op.kind == "input":
            continue
        values[name] = ascent.output(op, [values[source] for source in op.inputs])
        for source in {source for source in op.inputs if last_use[source] == name}:
            del values[source]
    return values[target], ascent.kept


class _Ascent:
    """The windows of a few cells of one layer on their way up; always zero beside the map."""

    def __init__(self, graph: Graph, plan: Mapping[str, ReceptiveField], windows: Windows, semantics: Semantics):
        self.graph, self.plan, self.windows, self.semantics = graph, plan, windows, semantics
        self.kept: Keep = {}

    def output(self, op: Operation, inputs: list[Tensor]) -> Tensor:
        """The planned window of an operation's output."""
        read = [self._read(op, source, x) for source, x in zip(op.inputs, inputs, strict=True)]
        if op.kind == "maxpool":
            y, self.kept[op.name] = _pool_with_switches(op, read[0], (0, 0), ceil=False)
        else:
            y = self._compute(op, read)
            if _needed(op, self.semantics):
                self.kept[op.name] = _kept_of(op, read[0], y)
        if len(op.shape) != 3:
            return y
        return self.windows.clear_beside_(y, self.plan[op.name], (op.shape[1], op.shape[2]))

    def _read(self, op: Operation, source: str, x: Tensor) -> Tensor:
        """Of an input's planned window the part that the operation's planned window is computed from."""
        if op.window is None:
            return self.windows.move(x, self.plan[source], self.plan[op.name]) if op.pointwise else x
        field = beneath(self.plan[op.name], op.window)
        x = self.windows.move(x, self.plan[source], field)
        if op.kind == "maxpool":
            _, rows, cols = self.graph.operations[source].shape
            beside = self.windows.beside(field, (rows, cols))
            return x if beside is None else x.masked_fill(beside, float("-inf"))
        return x

    def _compute(self, op: Operation, read: list[Tensor]) -> Tensor:
        """As the module does, but for the padding, which is in the windows."""
        window = op.window
        if window is None or op.kind == "pad":
            y: Tensor = read[0] if op.kind == "pad" else op.compute(*read)
            return y
        if op.kind == "conv":
            assert isinstance(op.module, nn.Conv2d)
            conv = op.module
            return F.conv2d(read[0], conv.weight, conv.bias, window.stride, 0, window.dilation, conv.groups)
        total = F.avg_pool2d(read[0], window.kernel, window.stride, divisor_override=1)
        for axis, count in enumerate(average_counts(op, self.graph.operations[op.inputs[0]].shape)):
            index = self.windows.lines(self.plan[op.name], axis).clamp(0, len(count) - 1)
            share = count.to(total.device, total.dtype)[index]
            total = total / (share[:, None, :, None] if axis == 0 else share[:, None, None, :])
        return total
