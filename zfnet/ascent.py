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
from zfnet.graph import Graph, Operation, Pair, Window
from zfnet.receptive import ReceptiveField, beneath, whole_map
from zfnet.windows import Windows

Keep = dict[str, Tensor]
"""Per max pool its switches, per ReLU where it was positive, per normalisation its input; those that are needed."""


def run_whole(
    graph: Graph, images: Tensor, targets: Sequence[str], semantics: Semantics
) -> tuple[dict[str, Tensor], Keep]:
    """Run images [N, channels, rows, cols] forward: the outputs of the targets, and what was kept of whole maps."""
    kept: Keep = {}
    instead = {name: _keeping(graph.operations[name], semantics, kept) for name in graph.ancestors(targets)}
    images = images.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
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
    cell_of, position_of = _codes(window, (x.shape[-2], x.shape[-1]), x.device)
    rows = torch.arange(y.shape[-2], device=x.device)[:, None] * window.stride[0] - padding[0]
    cols = torch.arange(y.shape[-1], device=x.device) * window.stride[1] - padding[1]
    begins = (rows * window.span[1] + cols)[:, :, None]
    index = index.permute(0, 2, 3, 1)
    further = cell_of.index_select(0, index.flatten()).view(index.shape).sub_(begins)
    return y, position_of.index_select(0, further.flatten()).view(index.shape).permute(0, 3, 1, 2)


def _codes(window: Window, size: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    """Divisions by table, which is much faster: in steps of a grid as wide as the window spans,

    cell of the flat map -> its place, and how far a cell lies beyond its window's first -> position in the kernel.
    """
    row, col = torch.arange(size[0], device=device)[:, None], torch.arange(size[1], device=device)
    down, right = (torch.arange(k, device=device) * d for k, d in zip(window.kernel, window.dilation, strict=True))
    count = window.kernel[0] * window.kernel[1]
    kind = torch.uint8 if count < 256 else torch.int32
    position_of = torch.zeros(window.span[0] * window.span[1], dtype=kind, device=device)
    position_of[(down[:, None] * window.span[1] + right).flatten()] = torch.arange(count, device=device).to(kind)
    return (row * window.span[1] + col).flatten(), position_of


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
    """The windows of a few cells of one layer on their way up.

    What a window holds beside the map is cleared by the operation that would mix it into cells of the map.
    """

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
        return y

    def _read(self, op: Operation, source: str, x: Tensor) -> Tensor:
        """Of an input's planned window the part that the operation's planned window is computed from."""
        if op.kind == "binpool":
            return self.windows.move(x, self.plan[source], whole_map(self.graph, source))
        if op.window is None and not op.pointwise:
            return x
        field = self.plan[op.name] if op.window is None else beneath(self.plan[op.name], op.window)
        x = self.windows.move(x, self.plan[source], field)
        if op.window is None and op.kind != "normalisation":
            return x
        _, rows, cols = self.graph.operations[source].shape
        return self.windows.clear_beside_(x, field, (rows, cols), float("-inf") if op.kind == "maxpool" else 0)

    def _compute(self, op: Operation, read: list[Tensor]) -> Tensor:
        """As the module does, but for the padding, which is in the windows."""
        window = op.window
        if window is None or op.kind == "pad":
            y: Tensor = read[0] if op.kind == "pad" else op.compute(*read)
            if op.kind == "binpool" and y.ndim == 4:
                y = self.windows.move(y, whole_map(self.graph, op.name), self.plan[op.name])
            return y
        if op.kind == "conv":
            assert isinstance(op.module, nn.Conv2d)
            conv = op.module
            return F.conv2d(read[0], conv.weight, conv.bias, window.stride, 0, window.dilation, conv.groups)
        total = F.avg_pool2d(read[0], window.kernel, window.stride, divisor_override=1)
        return total / self.windows.divisors(op, self.plan[op.name], self.graph.operations[op.inputs[0]].shape, total)
