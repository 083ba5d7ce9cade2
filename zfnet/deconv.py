"""Projections: what in an image made a cell fire, drawn in its pixels, for many cells at once.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, Sec. 2.1: run the image forward
and keep the switches of every max pool; set every activation of the layer but one to zero; then, down to the pixels,
unpool with the switches, rectify, and filter with the transposed filters. There is no bias, no contrast normalisation
and no rectification of the pixels themselves.

A cell depends on its receptive field alone, so only that window of each map is carried down: one cell of ZFNet's
conv5 touches 3 x 3 cells of conv4 and 139 x 139 pixels. Windows of many cells of one layer go down together. Where the
window is as large as the map, it is the map. Residual sums and concatenations carry windows along each branch, and add
them up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.graph import Graph, Operation, Pair, Window, average_counts, bins
from zfnet.receptive import ReceptiveField, beneath, fields_beneath, receptive_field


class Unprojectable(ValueError):
    """Operations beneath the layer have no known way down."""


@dataclass(frozen=True, kw_only=True)
class Semantics:
    """What the paper leaves open, and what others do; the defaults are the paper's, or ours where it is silent."""

    seed: Literal["activation", "one"] = "activation"
    """What the one cell starts with: its activation (the paper), or 1."""
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


class Cells(NamedTuple):
    """Cells of one layer; four integer tensors of shape [M]. Units of a fully connected layer have row = col = 0."""

    image: Tensor
    feature_map: Tensor
    row: Tensor
    col: Tensor


class Projections(NamedTuple):
    """Projections of M cells, cut to their receptive fields, in input pixels."""

    pixels: Tensor
    """[M, channels, height, width]; zero outside the image."""
    top: Tensor
    """[M]; row of the window's first pixel in the image, negative where the window leaves it."""
    left: Tensor
    """[M]; column of the window's first pixel."""


@dataclass(frozen=True, eq=False)
class Record:
    """One forward pass of N images: the layers' activations, and what the way down needs of each image."""

    graph: Graph
    semantics: Semantics
    images: int
    activations: dict[str, Tensor]
    kept: dict[str, Tensor]
    """Per max pool its switches, per ReLU where it was positive, per normalisation its input; those that are needed."""

    def activation(self, layer: str) -> Tensor:
        """[N, maps, rows, cols] of a recorded layer, after its batch norm and ReLU; units have maps of 1 x 1."""
        if layer not in self.activations:
            raise ValueError(
                f"{layer!r} was not recorded, only {', '.join(self.activations)}: name it in record(layers=)"
            )
        activation = self.activations[layer]
        return activation if activation.ndim == 4 else activation[:, :, None, None]


def record(graph: Graph, images: Tensor, layers: Sequence[str], semantics: Semantics | None = None) -> Record:
    """Run images [N, channels, rows, cols] forward once, for projections from any of the layers.

    Raises UnknownLayer for a name that is not of the network, Unprojectable where the way down is not known.
    """
    semantics = semantics or Semantics()
    targets = {layer: graph.activation_of(layer) for layer in layers}
    for layer, target in targets.items():
        _check_way_down(graph, layer, target)
    kept: dict[str, Tensor] = {}
    beneath_all = graph.ancestors(set(targets.values()))
    instead = {name: _keeping(graph.operations[name], semantics, kept) for name in beneath_all}
    outputs = graph.run(images, set(targets.values()), {name: run for name, run in instead.items() if run})
    activations = {layer: outputs[target] for layer, target in targets.items()}
    return Record(graph, semantics, len(images), activations, kept)


@torch.no_grad()
def project(record: Record, layer: str, cells: Cells, window_batch: int = 16) -> Projections:
    """Project cells of a recorded layer, each alone, down to the pixels of its receptive field.

    At most `window_batch` windows are in memory at a time; beside rounding the result does not depend on it. The
    same call gives the same bits (on CUDA under torch.use_deterministic_algorithms, for the sums of unpooling). Raises
    ValueError for a layer that was not recorded and for cells that are not on its maps.
    """
    activation = record.activation(layer)
    target = record.graph.activation_of(layer)
    cells = Cells(*(torch.as_tensor(index, device=activation.device) for index in cells))
    _check_cells(cells, activation.shape, layer)
    plan = fields_beneath(record.graph, target, inside=True)
    seen = receptive_field(record.graph, target)
    top, left, height, width = seen.box(cells.row, cells.col)
    pixels = activation.new_zeros(len(cells.row), record.graph.input_shape[0], height, width)
    for first in range(0, len(pixels), window_batch):
        some = slice(first, first + window_batch)
        descent = _Descent(record, plan, Cells(*(index[some] for index in cells)))
        pixels[some] = descent.to_pixels(target, activation, seen)
    return Projections(pixels, top, left)


def _check_way_down(graph: Graph, layer: str, target: str) -> None:
    beneath_it = [graph.operations[name] for name in graph.ancestors([target])]
    foreign = [
        f"{op.name} ({type(op.module).__name__ if op.module else op.kind})" for op in beneath_it if not _known(op)
    ]
    if foreign:
        raise Unprojectable(
            f"layer {layer!r} cannot be projected: beneath it are {', '.join(foreign)}, whose way down is not known. "
            f"Expected only {', '.join(_WAYS_DOWN)}: choose a layer beneath them"
        )


def _known(op: Operation) -> bool:
    return op.kind in _WAYS_DOWN or op.kind == "input"


def _check_cells(cells: Cells, shape: Sequence[int], layer: str) -> None:
    if len({len(index) for index in cells}) > 1 or any(index.is_floating_point() for index in cells):
        raise ValueError(f"cells need four integer tensors of one length; lengths {[len(i) for i in cells]} were given")
    for name, index, size in zip(Cells._fields, cells, shape, strict=True):
        wrong = index[(index < 0) | (index >= size)]
        if len(wrong):
            raise ValueError(f"{name} {int(wrong[0])} was given; layer {layer!r} has 0 to {size - 1}")


# --- what is kept on the way up --------------------------------------------------------------------------------------


def _keeping(op: Operation, semantics: Semantics, kept: dict[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    """How the operation computes and keeps what its way down needs; None where it needs nothing."""

    def pool(x: Tensor) -> Tensor:
        y, kept[op.name] = _pool_with_switches(op, x)
        return y

    def rectify(x: Tensor) -> Tensor:
        y: Tensor = op.compute(x)
        kept[op.name] = y > 0
        return y

    def normalise(x: Tensor) -> Tensor:
        kept[op.name] = x
        y: Tensor = op.compute(x)
        return y

    if op.kind == "maxpool":
        return pool
    if op.kind == "relu" and semantics.relu != "deconvnet":
        return rectify
    if op.kind == "normalisation" and semantics.normalisation == "gradient":
        return normalise
    return None


def _pool_with_switches(op: Operation, x: Tensor) -> tuple[Tensor, Tensor]:
    """Max pooling, and per output cell which position of its window holds the maximum, counted row by row.

    Positions inside the window, and not on the map as torch counts them, stay true when a window is cut out.
    """
    assert isinstance(op.module, nn.MaxPool2d)
    assert op.window is not None
    pool, window = op.module, op.window
    y, index = F.max_pool2d(
        x, pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode, return_indices=True
    )
    rows = torch.arange(y.shape[-2], device=x.device)[:, None] * window.stride[0] - window.pad_before[0]
    cols = torch.arange(y.shape[-1], device=x.device) * window.stride[1] - window.pad_before[1]
    down = (index // x.shape[-1] - rows) // window.dilation[0]
    right = (index % x.shape[-1] - cols) // window.dilation[1]
    positions = window.kernel[0] * window.kernel[1]
    return y, (down * window.kernel[1] + right).to(torch.uint8 if positions < 256 else torch.int32)


# --- the way down ----------------------------------------------------------------------------------------------------

Contribution = tuple[str, Tensor, ReceptiveField]
"""To which operation, the signal [M, maps, rows, cols] of windows (or [M, units]), and where those windows lie."""


Slices = tuple[slice, slice]


class _Descent:
    """The windows of a few cells of one layer on their way to the pixels."""

    def __init__(self, record: Record, plan: Mapping[str, ReceptiveField], cells: Cells):
        self.record, self.graph, self.semantics = record, record.graph, record.semantics
        self.plan, self.cells = plan, cells

    def to_pixels(self, target: str, activation: Tensor, seen: ReceptiveField) -> Tensor:
        """[M, channels, height, width] of the receptive fields `seen`."""
        signals = {target: self._seed(activation, flat=len(self.graph.operations[target].shape) == 1)}
        for name in reversed(self.graph.ancestors([target])):
            op, signal, field = self.graph.operations[name], signals.pop(name), self.plan[name]
            if op.kind == "input":
                return self._place(signal, field, seen)
            for source, values, where in _WAYS_DOWN[op.kind](self, op, signal, field):
                placed = self._onto_map(values, where, source)
                signals[source] = signals[source] + placed if source in signals else placed
        raise ValueError(f"layer {target!r} does not depend on the image; there is nothing to project")

    def _seed(self, activation: Tensor, flat: bool) -> Tensor:
        """Every activation zero but the chosen one (Sec. 2.1): windows of one cell, or all units."""
        image, feature_map, row, col = self.cells
        values = activation[image, feature_map, row, col]
        if self.semantics.seed == "one":
            values = torch.ones_like(values)
        signal = activation.new_zeros(len(image), activation.shape[1])
        signal[torch.arange(len(image), device=signal.device), feature_map] = values
        return signal if flat else signal[:, :, None, None]

    def _onto_map(self, values: Tensor, where: ReceptiveField, source: str) -> Tensor:
        """The signal in the windows that are planned for `source`."""
        return values if values.ndim == 2 else self._place(values, where, self.plan[source])

    def zero_beside_(self, values: Tensor, where: ReceptiveField, source: str) -> Tensor:
        """Zero, in place, what of the windows `where` lies beside the map of `source`: padding passes nothing down."""
        _, rows, cols = self.graph.operations[source].shape
        whole = ReceptiveField((0, 0), (0, 0), (rows, cols))
        for window, ((on_rows, on_cols), _) in zip(values, self._overlaps(where, whole), strict=True):
            for beside in (slice(0, on_rows.start), slice(on_rows.stop, None)):
                window[:, beside] = 0
            for beside in (slice(0, on_cols.start), slice(on_cols.stop, None)):
                window[:, :, beside] = 0
        return values

    def _place(self, values: Tensor, where: ReceptiveField, wanted: ReceptiveField) -> Tensor:
        """Cut or fill up with zeros, from the windows `where` to the windows `wanted`."""
        if where == wanted:
            return values
        if where.jump == wanted.jump:
            before = [s - t for s, t in zip(where.start, wanted.start, strict=True)]
            after = [w - n - b for w, n, b in zip(wanted.size, where.size, before, strict=True)]
            return F.pad(values, (before[1], after[1], before[0], after[0]))
        placed = values.new_zeros(*values.shape[:2], *wanted.size)
        for m, (to, source) in enumerate(self._overlaps(wanted, where)):
            placed[(m, slice(None), *to)] = values[(m, slice(None), *source)]
        return placed

    def windows_of(self, kept: Tensor, field: ReceptiveField, fill: int = 0) -> Tensor:
        """Each cell's window [M, maps, rows, cols] of what was kept of its image; `fill` beside the map."""
        whole = ReceptiveField((0, 0), (0, 0), (kept.shape[-2], kept.shape[-1]))
        if kept.ndim == 2 or field == whole:
            return kept[self.cells.image]
        windows = kept.new_full((len(self.cells.image), kept.shape[1], *field.size), fill)
        images = self.cells.image.tolist()
        for m, (to, source) in enumerate(self._overlaps(field, whole)):
            windows[(m, slice(None), *to)] = kept[(images[m], slice(None), *source)]
        return windows

    def indices(self, field: ReceptiveField, axis: int) -> Tensor:
        """[M, size]: the rows (axis 0) or columns (axis 1) of the map that each cell's window covers."""
        cell = (self.cells.row, self.cells.col)[axis]
        first = field.start[axis] + field.jump[axis] * cell
        return first[:, None] + torch.arange(field.size[axis], device=cell.device)

    def _overlaps(self, one: ReceptiveField, other: ReceptiveField) -> Iterator[tuple[Slices, Slices]]:
        """Per cell, where its two windows overlap: as slices of the one and of the other."""
        rows, cols = self.cells.row.tolist(), self.cells.col.tolist()
        for row, col in zip(rows, cols, strict=True):
            (top, left, height, width), (top2, left2, height2, width2) = one.box(row, col), other.box(row, col)
            vertical = _overlap(top, height, top2, height2)
            horizontal = _overlap(left, width, left2, width2)
            yield (vertical[0], horizontal[0]), (vertical[1], horizontal[1])


def _overlap(start: int, size: int, other_start: int, other_size: int) -> tuple[slice, slice]:
    first = max(start, other_start)
    end = max(first, min(start + size, other_start + other_size))
    return slice(first - start, end - start), slice(first - other_start, end - other_start)


def _pass(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Identity and sums: every input gets the signal."""
    for source in op.inputs:
        yield source, signal, field


def _rectify(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Sec. 2.1: "we pass the reconstructed signal through a relu non-linearity"; the forward mask only if asked for."""
    rule = descent.semantics.relu
    if rule != "gradient":
        signal = signal.relu()
    if rule != "deconvnet":
        signal = signal * descent.windows_of(descent.record.kept[op.name], field)
    yield op.inputs[0], signal, field


def _filter(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Sec. 2.1, "transposed versions of the same filters": conv_transpose2d flips them itself. No bias."""
    assert isinstance(op.module, nn.Conv2d)
    assert op.window is not None
    conv, window = op.module, op.window
    few_colours = conv.in_channels <= 4 and conv.groups == 1
    if few_colours and window.stride[0] == window.stride[1] > 1 and window.dilation == (1, 1):
        signal = _filter_by_phases(signal, conv.weight, window.stride[0])
    else:
        signal = F.conv_transpose2d(signal, conv.weight, None, window.stride, 0, 0, conv.groups, window.dilation)
    below = beneath(field, window)
    yield op.inputs[0], descent.zero_beside_(signal, below, op.inputs[0]), below


def _filter_by_phases(signal: Tensor, weight: Tensor, stride: int) -> Tensor:
    """conv_transpose2d(signal, weight, stride=stride) as one dense convolution and an interleaving.

    Pixels that are a stride apart are made by the same part of the filter. It is 2.5 times as fast down to three
    colours on a CPU, where most of a projection's time goes into the first layer.
    """
    maps, _, rows, cols = weight.shape
    height, width = ((n - 1) * stride + k for n, k in zip(signal.shape[2:], (rows, cols), strict=True))
    steps = [-(-k // stride) for k in (rows, cols)]
    filled = F.pad(weight, (0, steps[1] * stride - cols, 0, steps[0] * stride - rows))
    parts = filled.view(maps, -1, steps[0], stride, steps[1], stride).permute(1, 3, 5, 0, 2, 4).flip(4, 5)
    phases = F.conv2d(signal, parts.reshape(-1, maps, *steps), padding=(steps[0] - 1, steps[1] - 1))
    return F.pixel_shuffle(phases, stride)[:, :, :height, :width].contiguous()


def _weigh(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Fully connected: the transposed weights, no bias."""
    assert isinstance(op.module, nn.Linear)
    yield op.inputs[0], signal @ op.module.weight, field


def _unflatten(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Units back to maps."""
    source = op.inputs[0]
    yield source, signal.view(len(signal), *descent.graph.operations[source].shape), descent.plan[source]


def _rescale(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Batch norm in evaluation is a factor per map; its shift is a bias, and there is no bias on the way down."""
    norm = op.module
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = norm.weight * factor
    yield op.inputs[0], signal * (factor if signal.ndim == 2 else factor[:, None, None]), field


def _denormalise(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """ECCV, Sec. 2.1: no contrast normalisation "when in this reconstruction path"; its gradient only if asked for."""
    if descent.semantics.normalisation == "gradient":
        assert op.module is not None
        x = descent.windows_of(descent.record.kept[op.name], field)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (signal,) = torch.autograd.grad(op.module.forward(x), x, signal)
    yield op.inputs[0], signal, field


def _split(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """A concatenation gives every input its own feature maps."""
    maps = [descent.graph.operations[source].shape[0] for source in op.inputs]
    for source, part in zip(op.inputs, signal.split(maps, dim=1), strict=True):
        yield source, part, field


def _unpad(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """The same windows, seen from the map without its padding."""
    assert op.window is not None
    below = beneath(field, op.window)
    yield op.inputs[0], descent.zero_beside_(signal.clone(), below, op.inputs[0]), below


def _spread(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Average pooling: every cell of a window gets the same share; overlapping windows add up."""
    assert op.window is not None
    counts = average_counts(op, descent.graph.operations[op.inputs[0]].shape)
    for axis, count in enumerate(counts):
        index = descent.indices(field, axis).clamp(0, len(count) - 1)
        share = count.to(signal.device, signal.dtype)[index]
        signal = signal / (share[:, None, :, None] if axis == 0 else share[:, None, None, :])
    ones = signal.new_ones(1, 1, *op.window.kernel)
    spread = F.conv_transpose2d(signal.flatten(0, 1)[:, None], ones, stride=op.window.stride)
    spread, below = spread.view(*signal.shape[:2], *spread.shape[2:]), beneath(field, op.window)
    yield op.inputs[0], descent.zero_beside_(spread, below, op.inputs[0]), below


def _spread_bins(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Average pooling over bins of several sizes, on the whole map: every cell of a bin gets the same share."""
    source = op.inputs[0]
    rows, cols = (m.to(signal.device, signal.dtype) for m in bins(op, descent.graph.operations[source].shape))
    whole = ReceptiveField((0, 0), (0, 0), (len(rows), len(cols)))
    signal = signal[:, :, None, None] if signal.ndim == 2 else descent._place(signal, field, whole)
    yield source, rows.T @ signal @ cols, descent.plan[source]


def _unpool(descent: _Descent, op: Operation, signal: Tensor, field: ReceptiveField) -> Iterator[Contribution]:
    """Sec. 2.1, "unpooling": each signal goes to the place of its window's maximum, by that image's switches.

    Never max_unpool2d: where windows overlap it lets one overwrite the other, in no defined order.
    """
    assert op.window is not None
    window, rule = op.window, descent.semantics.unpool
    if rule != "sum":  # windows beside ours may point at the same place: they take part, without a signal
        halo = [(span - 1) // stride for span, stride in zip(window.span, window.stride, strict=True)]
        signal = F.pad(signal, (halo[1], halo[1], halo[0], halo[0]))
        start = (field.start[0] - halo[0], field.start[1] - halo[1])
        field = ReceptiveField(field.jump, start, (field.size[0] + 2 * halo[0], field.size[1] + 2 * halo[1]))
    below = beneath(field, window)
    places, nowhere = below.size[0] * below.size[1], window.kernel[0] * window.kernel[1]
    switches = descent.windows_of(descent.record.kept[op.name], field, fill=nowhere)
    begins, position = _places(field.size, below.size, window, signal.device)
    target = (begins + position[switches.int()]).clamp_(max=places)
    unpooled = _SHARED[rule](signal.flatten(2), target.flatten(2), places + 1)
    yield op.inputs[0], unpooled[:, :, :places].unflatten(2, below.size), below


def _places(size: Pair, below: Pair, window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each pool window begins in the flat window below, and how far on each position of its kernel lies.

    The position after the last, of pool windows that are not on the map, lies beyond everything.
    """
    row, col = torch.arange(size[0], device=device)[:, None], torch.arange(size[1], device=device)
    begins = row * (window.stride[0] * below[1]) + col * window.stride[1]
    down = torch.arange(window.kernel[0], device=device)[:, None] * (window.dilation[0] * below[1])
    right = torch.arange(window.kernel[1], device=device) * window.dilation[1]
    return begins, F.pad((down + right).flatten(), (0, 1), value=below[0] * below[1])


def _sum_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    return signal.new_zeros(*signal.shape[:2], size).scatter_add_(2, target, signal)


def _mean_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    windows = _sum_shared(torch.ones_like(signal), target, size)
    return _sum_shared(signal, target, size) / windows.clamp_(min=1)


def _max_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    empty = signal.new_zeros(*signal.shape[:2], size)
    return empty.scatter_reduce_(2, target, signal, "amax", include_self=False)


def _last_shared(signal: Tensor, target: Tensor, size: int) -> Tensor:
    order = torch.arange(1, signal.shape[2] + 1, device=signal.device).expand_as(target)
    last = torch.zeros_like(target[:, :, :1]).repeat(1, 1, size).scatter_reduce_(2, target, order, "amax")
    return torch.where(last > 0, signal.gather(2, (last - 1).clamp_(min=0)), 0)


_SHARED = {"sum": _sum_shared, "mean": _mean_shared, "max": _max_shared, "last": _last_shared}

_WAYS_DOWN: dict[str, Callable[[_Descent, Operation, Tensor, ReceptiveField], Iterator[Contribution]]] = {
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
