"""The way down of a projection: the windows of a few cells of one layer, operation by operation, to the pixels.

Zeiler and Fergus, ECCV 2014, Sec. 2.1: unpool with the switches, rectify, filter with the transposed filters. Every way
down is linear in the signal but for the rectification, and takes windows that are zero beside the map. Whole maps are
windows like others: those that cover the map.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.graph import Graph, Operation, Pair, Window, bins
from zfnet.receptive import ReceptiveField, beneath, whole_map
from zfnet.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """What the paper leaves open, and what others do; the defaults are the paper's, or ours where it is silent."""

    cells: Literal["one", "all"] = "one"
    """What is projected: the one cell (the paper), or all cells of its feature map at once, over the whole image. The
    rectifications make the latter another picture than the sum of the former."""
    seed: Literal["activation", "one"] = "activation"
    """What a projected cell starts with: its activation (the paper), or 1."""
    unpool: Literal["sum", "mean", "max", "last"] = "sum"
    """What a place gets that is the maximum of several overlapping pool windows: the sum of their signals (the gradient
    of max pooling), their mean, the largest, or that of the last window in reading order. All windows of the map that
    point to the place take part, those without a signal too."""
    normalisation: Literal["identity", "gradient"] = "identity"
    """Contrast normalisation on the way down: nothing (ECCV, Sec. 2.1), or its gradient."""
    relu: Literal["deconvnet", "guided", "gradient"] = "deconvnet"
    """Rectify the signal (the paper); keep it where the activation was positive (gradient); or both (guided)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(field.type)
            if value not in allowed:
                raise ValueError(f"{field.name}={value!r} was given; expected one of {', '.join(allowed)}")


Kept = Callable[[str, ReceptiveField, int], Tensor]
"""Operation, field, fill -> each cell's window [M, maps, rows, cols] of what its way down needs; `fill` beside it."""

Contribution = tuple[str, Tensor, ReceptiveField]
"""To which operation, the signal [M, maps, rows, cols] of windows (or [M, units]), and where those windows lie. The
signal is the receiver's own: it may write into it."""


@dataclass(frozen=True, eq=False)
class Descent:
    """The windows of a few cells of one layer on their way to the pixels."""

    graph: Graph
    semantics: Semantics
    plan: Mapping[str, ReceptiveField]
    """Of every operation beneath: the window of its map that is carried."""
    windows: Windows
    feature_map: Tensor
    """[M]: the one map of the layer that has a signal at the start."""
    kept: Kept
    first: str | None
    """The filtering that still meets a signal in that one map alone."""

    def to_pixels(self, target: str, seed: Tensor, seen: ReceptiveField) -> Tensor:
        """[M, channels, height, width] of the receptive fields `seen`, from the seeds [M, rows, cols] of `target`."""
        signals = {target: self._one_map(seed, target)}
        for name in reversed(self.graph.ancestors([target])):
            op, signal, field = self.graph.operations[name], signals.pop(name), self.plan[name]
            if op.kind == "input":
                return self.windows.move(signal, field, seen)
            for source, values, where in WAYS_DOWN[op.kind](self, op, signal, field):
                placed = values if values.ndim == 2 else self.windows.move(values, where, self.plan[source])
                signals[source] = signals[source] + placed if source in signals else placed
        raise ValueError(f"layer {target!r} does not depend on the image; there is nothing to project")

    def _one_map(self, seed: Tensor, target: str) -> Tensor:
        """Every other map is zero (Sec. 2.1)."""
        shape = self.graph.operations[target].shape
        signal = seed.new_zeros(len(seed), shape[0], *seed.shape[1:])
        signal[self.windows.own, self.feature_map] = seed
        return signal.flatten(1) if len(shape) == 1 else signal

    def map_size(self, name: str) -> Pair:
        """Rows and columns of an operation's map."""
        _, rows, cols = self.graph.operations[name].shape
        return rows, cols


def first_filter(graph: Graph, target: str) -> str | None:
    """The filtering beneath `target` that only its own map reaches, between them nothing that mixes maps."""
    op = graph.operations[target]
    while op.kind in ("relu", "batchnorm", "identity"):
        op = graph.operations[op.inputs[0]]
    return op.name if op.kind in ("conv", "linear") else None


def _pass(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Identity and sums: every input gets the signal."""
    for number, source in enumerate(op.inputs):
        yield source, signal.clone() if number else signal, field


def _rectify(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Sec. 2.1: "we pass the reconstructed signal through a relu non-linearity"; the forward mask only if asked for."""
    rule = descent.semantics.relu
    if rule != "gradient":
        signal = signal.relu_()
    if rule != "deconvnet":
        signal = signal * descent.kept(op.name, field, 0)
    yield op.inputs[0], signal, field


def _filter(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Sec. 2.1, "transposed versions of the same filters": conv_transpose2d flips them itself. No bias."""
    assert isinstance(op.module, nn.Conv2d)
    assert op.window is not None
    conv, window, (source,) = op.module, op.window, op.inputs
    few_colours = conv.in_channels <= 4 and conv.groups == 1
    if op.name == descent.first:
        signal = _filter_one(signal[descent.windows.own, descent.feature_map], conv, descent.feature_map, window)
    elif few_colours and window.stride[0] == window.stride[1] > 1 and window.dilation == (1, 1):
        signal = _filter_by_phases(signal, conv.weight, window.stride[0])
    else:
        signal = F.conv_transpose2d(signal, conv.weight, None, window.stride, 0, 0, conv.groups, window.dilation)
    below = beneath(field, window)
    if window.pad_before != (0, 0) or window.pad_after != (0, 0):  # else cells on the map read cells on the map
        signal = descent.windows.clear_beside_(signal, below, descent.map_size(source))
    yield source, signal, below


def _filter_one(signal: Tensor, conv: nn.Conv2d, feature_map: Tensor, window: Window) -> Tensor:
    """conv_transpose2d of signals [M, rows, cols] that are in one map each: its own filter alone has work to do."""
    filters = conv.weight[feature_map]
    if signal.shape[1:] == (1, 1) and window.dilation == (1, 1):
        filtered = filters * signal[:, None]
    else:
        one = F.conv_transpose2d(signal[None], filters, None, window.stride, 0, 0, len(signal), window.dilation)
        filtered = one[0].unflatten(0, (len(signal), -1))
    if conv.groups == 1:
        return filtered
    groups = filtered.new_zeros(len(signal), conv.groups, *filtered.shape[1:])
    groups[torch.arange(len(signal), device=signal.device), feature_map // (conv.out_channels // conv.groups)] = (
        filtered
    )
    return groups.flatten(1, 2)


def _filter_by_phases(signal: Tensor, weight: Tensor, stride: int) -> Tensor:
    """conv_transpose2d(signal, weight, stride=stride) as one dense convolution and an interleaving.

    Pixels that are a stride apart are made by the same part of the filter. It is 3 times as fast down to three
    colours on a CPU, where a third of a projection's time goes into the first layer.
    """
    maps, _, rows, cols = weight.shape
    height, width = ((n - 1) * stride + k for n, k in zip(signal.shape[2:], (rows, cols), strict=True))
    steps = [-(-k // stride) for k in (rows, cols)]
    filled = F.pad(weight, (0, steps[1] * stride - cols, 0, steps[0] * stride - rows))
    parts = filled.view(maps, -1, steps[0], stride, steps[1], stride).permute(1, 3, 5, 0, 2, 4).flip(4, 5)
    phases = F.conv2d(signal, parts.reshape(-1, maps, *steps), padding=(steps[0] - 1, steps[1] - 1))
    return F.pixel_shuffle(phases, stride)[:, :, :height, :width]


def _weigh(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Fully connected: the transposed weights, no bias."""
    assert isinstance(op.module, nn.Linear)
    weight = op.module.weight
    if op.name == descent.first:
        signal = signal[descent.windows.own, descent.feature_map][:, None] * weight[descent.feature_map]
    else:
        signal = signal @ weight
    yield op.inputs[0], signal, field


def _unflatten(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Units back to maps."""
    source = op.inputs[0]
    yield source, signal.view(len(signal), *descent.graph.operations[source].shape), descent.plan[source]


def _rescale(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Batch norm in evaluation is a factor per map; its shift is a bias, and there is no bias on the way down."""
    norm = op.module
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = norm.weight * factor
    yield op.inputs[0], signal * (factor if signal.ndim == 2 else factor[:, None, None]), field


def _denormalise(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """ECCV, Sec. 2.1: no contrast normalisation "when in this reconstruction path"; its gradient only if asked for."""
    if descent.semantics.normalisation == "gradient":
        assert op.module is not None
        with torch.inference_mode(False), torch.enable_grad():  # tensors made in inference mode have no gradient
            x = descent.kept(op.name, field, 0).detach().clone().requires_grad_()
            (signal,) = torch.autograd.grad(op.module.forward(x), x, signal.clone())
    yield op.inputs[0], signal, field


def _split(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """A concatenation gives every input its own feature maps."""
    maps = [descent.graph.operations[source].shape[0] for source in op.inputs]
    for source, part in zip(op.inputs, signal.split(maps, dim=1), strict=True):
        yield source, part, field


def _unpad(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """The same windows, seen from the map without its padding."""
    assert op.window is not None
    below = beneath(field, op.window)
    yield op.inputs[0], descent.windows.clear_beside_(signal, below, descent.map_size(op.inputs[0])), below


def _spread(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Average pooling: every cell of a window gets the same share; overlapping windows add up."""
    assert op.window is not None
    signal = signal / descent.windows.divisors(op, field, descent.graph.operations[op.inputs[0]].shape, signal)
    ones = signal.new_ones(1, 1, *op.window.kernel)
    spread = F.conv_transpose2d(signal.flatten(0, 1)[:, None], ones, stride=op.window.stride)
    spread, below = spread.view(*signal.shape[:2], *spread.shape[2:]), beneath(field, op.window)
    yield op.inputs[0], descent.windows.clear_beside_(spread, below, descent.map_size(op.inputs[0])), below


def _spread_bins(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Average pooling over bins of several sizes, on the whole map: every cell of a bin gets the same share."""
    graph, source = descent.graph, op.inputs[0]
    rows, cols = (m.to(signal.device, signal.dtype) for m in bins(op, graph.operations[source].shape))
    if signal.ndim == 2:
        signal = signal[:, :, None, None]
    signal = descent.windows.move(signal, field, whole_map(graph, op.name))
    yield source, rows.T @ signal @ cols, whole_map(graph, source)


def _unpool(descent: Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Sec. 2.1, "unpooling": each signal goes to the place of its window's maximum, by that image's switches.

    Never max_unpool2d: where windows overlap it lets one overwrite the other, in no defined order.
    """
    assert op.window is not None
    window, rule, maps = op.window, descent.semantics.unpool, signal.shape[1]
    if rule != "sum":  # windows beside ours may point at the same place: they take part, without a signal
        halo = [(span - 1) // stride for span, stride in zip(window.span, window.stride, strict=True)]
        signal = F.pad(signal, (halo[1], halo[1], halo[0], halo[0]))
        start = (field.start[0] - halo[0], field.start[1] - halo[1])
        field = ReceptiveField(field.jump, start, (field.size[0] + 2 * halo[0], field.size[1] + 2 * halo[1]))
    below = beneath(field, window)
    size, nowhere = below.size[0] * below.size[1] * maps, window.kernel[0] * window.kernel[1]
    switches = descent.kept(op.name, field, nowhere).permute(0, 2, 3, 1)
    begins, position = _places(field.size, below.size, window, maps, signal.device)
    target = position.index_select(0, switches.flatten().int()).view(switches.shape).add_(begins).clamp_(max=size)
    flat = signal.permute(0, 2, 3, 1).flatten(1)
    unpooled = _SHARED[rule](flat, target.flatten(1), size + 1)[:, :size]
    yield op.inputs[0], unpooled.unflatten(1, (*below.size, maps)).permute(0, 3, 1, 2), below


def _places(size: Pair, below: Pair, window: Window, maps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each pool window begins in the flat (row, column, map) below, and how far on each kernel position lies.

    The position after the last, of pool windows that are not on the map, lies beyond everything.
    """
    row, col = torch.arange(size[0], device=device)[:, None], torch.arange(size[1], device=device)
    begins = row * (window.stride[0] * below[1]) + col * window.stride[1]
    down = torch.arange(window.kernel[0], device=device)[:, None] * (window.dilation[0] * below[1])
    right = torch.arange(window.kernel[1], device=device) * window.dilation[1]
    position = F.pad((down + right).flatten(), (0, 1), value=below[0] * below[1])
    return begins[:, :, None] * maps + torch.arange(maps, device=device), position * maps


def _sum_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    return signal.new_zeros(len(signal), size).scatter_add_(1, target, signal)


def _mean_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    windows = _sum_shared(torch.ones_like(signal), target, size)
    return _sum_shared(signal, target, size) / windows.clamp_(min=1)


def _max_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    empty = signal.new_zeros(len(signal), size)
    return empty.scatter_reduce_(1, target, signal, "amax", include_self=False)


def _last_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    order = torch.arange(1, signal.shape[1] + 1, device=signal.device).expand_as(target)
    last = target.new_zeros(len(target), size).scatter_reduce_(1, target, order, "amax")
    return torch.where(last > 0, signal.gather(1, (last - 1).clamp_(min=0)), 0)


_SHARED = {"sum": _sum_shared, "mean": _mean_shared, "max": _max_shared, "last": _last_shared}

WAYS_DOWN: dict[str, Callable[[Descent, Operation, Tensor, ReceptiveField], Iterator[Contribution]]] = {
    "conv": _filter,
    "linear": _weigh,
    "relu": _rectify,
    "maxpool": _unpool,
    "avgpool": _spread,
    "binpool": _spread_bins,
    "normalisation": _denormalise,
    "batchnorm": _rescale,
    "identity": _pass,
    "pad": _unpad,
    "add": _pass,
    "cat": _split,
    "flatten": _unflatten,
}
"""Kind of operation -> how a signal goes down through it."""
