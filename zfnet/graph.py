"""A network traced once (torch.fx) into named operations with their geometry.

Every analysis that has to know which pixels a cell comes from works on this graph: receptive fields
(`zfnet.receptive`), projections (`zfnet.deconv`) and occlusion (`zfnet.occlusion`). `zfnet.tracing.trace` makes it.

Evaluation semantics always: dropout is the identity and batch norm uses its running statistics, whatever the model's
flags say. Nothing is done in place, no hook is called, and the model is left as it was found. Parameters are read when
the graph is run: weights loaded after the trace count.
"""

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from zfnet.models.layers import is_convolution

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Window:
    """How an operation slides over its input; every pair is (rows, columns), in cells.

    Output cell i reads the input cells i * stride - pad_before + dilation * (0 .. kernel - 1).
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    pad_before: Pair = (0, 0)
    pad_after: Pair = (0, 0)
    ceil: bool = False
    """The last window may hang over the edge (pools only)."""

    @property
    def span(self) -> Pair:
        """Input cells from the first to the last that one output cell reads."""
        rows, cols = ((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        return rows, cols

    def reach(self, size: Pair) -> Pair:
        """Input rows and columns that so many output rows and columns read."""
        rows, cols = ((n - 1) * stride + span for n, stride, span in zip(size, self.stride, self.span, strict=True))
        return rows, cols


@dataclass(frozen=True, eq=False)
class Operation:
    """One step of the network.

    `kind` is one of input, conv, linear, relu, maxpool, avgpool, binpool (averages over bins of several sizes, or to
    units: `zfnet.graph.bins`), normalisation, batchnorm, identity, pad, add, cat, flatten, softmax; "value" for what is
    not an activation (a size, a parameter); "unknown" for anything else.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    """Of one image's output, without the batch: (maps, rows, columns), or (units,). Empty for a value."""
    module: nn.Module | None
    """The module that does it, or does the same as the function that does it; None where there is no such module."""
    window: Window | None
    """Of conv, maxpool, avgpool and pad."""
    compute: Callable[..., Any]
    """Of the values of `inputs`, in their order; never in place."""
    pointwise: bool = False
    """Each output cell depends on the same cell of the inputs alone (in all maps): every kind of this sort, and
    activation functions of kind "unknown" such as ReLU6."""

    def multiply_adds(self, cells: int | None = None) -> int:
        """Of so many output cells in all their maps, by default all: one for every weight. Only convolutions and linear
        operations count; a linear one has one cell, all its units."""
        if not isinstance(self.module, nn.Conv2d | nn.Linear):
            return 0
        return self.module.weight.numel() * (math.prod(self.shape[1:]) if cells is None else cells)


class UnknownLayer(ValueError):
    """No operation has the name that was given, or none is of the kind that is needed."""


class Untraceable(ValueError):
    """torch.fx cannot follow the model."""


class Graph:
    """The operations of one network for one size of input, in the order in which they run; made by `trace`."""

    def __init__(self, model: nn.Module, operations: Mapping[str, Operation], output: str):
        self._model = model
        self.operations: Mapping[str, Operation] = MappingProxyType(dict(operations))
        self.output = output
        self.input = next(op.name for op in operations.values() if op.kind == "input")
        users: dict[str, list[str]] = {name: [] for name in operations}
        for op in operations.values():
            for name in dict.fromkeys(op.inputs):
                users[name].append(op.name)
        self.users: Mapping[str, tuple[str, ...]] = MappingProxyType({k: tuple(v) for k, v in users.items()})

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, rows, columns) of an input image."""
        return self.operations[self.input].shape

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the convolution and linear modules that give feature maps or units, in order."""
        return tuple(
            op.name
            for op in self.operations.values()
            if isinstance(op.module, nn.Conv2d | nn.Linear) and len(op.shape) in (1, 3)
        )

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the operations that are run but not understood."""
        return tuple(op.name for op in self.operations.values() if op.kind == "unknown")

    def limits(self, shown: int | None = 6) -> str:
        """What is not understood, by name, and what still works: for a reader, before any work starts.

        Args:
            shown: names of each sort at most; None: all.
        """
        sorts: dict[str, list[str]] = {}
        for name in self.unknown:
            module = self.operations[name].module
            sorts.setdefault(type(module).__name__ if module else name.rstrip("_0123456789"), []).append(name)
        named = [
            f"{sort}: {', '.join(names[:shown])}" + (" ..." if shown and len(names) > shown else "")
            for sort, names in sorts.items()
        ]
        beneath = [layer for layer in self.layers if not self._has_unknown(self.ancestors([self.activation_of(layer)]))]
        return (
            f"{len(self.unknown)} of {len(self.operations)} operations are not understood ({'; '.join(named)}). "
            "Sweeps work on every layer. Projections, and the occlusion job, which projects the last hidden "
            f"convolution, work for the layers beneath all of them: {', '.join(beneath) or 'none'}"
        )

    def _has_unknown(self, names: Collection[str]) -> bool:
        return any(self.operations[name].kind == "unknown" for name in names)

    @property
    def last_convolution(self) -> str:
        """Name of the last convolution that the output depends on; UnknownLayer where there is none.

        Fully connected layers in the form of convolutions (OverFeat's) do not count.
        """
        needed = set(self.ancestors([self.output]))
        convolutions = [n for n in self.layers if n in needed and is_convolution(self[n].module)]
        if not convolutions:
            raise UnknownLayer("this network has no convolution; the analysis expects a convolutional network")
        return convolutions[-1]

    def __getitem__(self, name: str) -> Operation:
        """The operation of that name; UnknownLayer with the nearest name where there is none."""
        if name in self.operations:
            return self.operations[name]
        near = difflib.get_close_matches(name, self.operations, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownLayer(
            f"the network has no layer {name!r}.{hint} Its layers are {', '.join(self.layers) or 'none'}; "
            "any other traced operation may be named too"
        )

    def activation_of(self, layer: str) -> str:
        """Name of the operation whose output is the layer's activation.

        For a convolution or linear module: the ReLU, else the batch norm, that directly and solely follows it, else
        itself. Any other operation: itself. UnknownLayer where there is no such operation.
        """
        if not isinstance(self[layer].module, nn.Conv2d | nn.Linear):
            return layer
        found = name = layer
        wanted = ["batchnorm", "relu"]
        while wanted and name != self.output and len(self.users[name]) == 1:
            (name,) = self.users[name]
            kind = self.operations[name].kind
            if kind in wanted:
                wanted = wanted[wanted.index(kind) + 1 :]
                found = name
            elif kind != "identity":
                break
        return found

    def ancestors(self, names: Collection[str], given: Collection[str] = ()) -> tuple[str, ...]:
        """The operations that `names` need, themselves included, in order; what is beneath `given` is left out."""
        needed: set[str] = set()
        waiting = [self[name].name for name in names]
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += [] if name in given else self.operations[name].inputs
        return tuple(name for name in self.operations if name in needed)

    def run(
        self, x: Tensor, names: Collection[str], instead: Mapping[str, Callable[..., Any]] | None = None
    ) -> dict[str, Tensor]:
        """Outputs of the operations `names` for the images x [N, channels, rows, columns].

        Only what the names need is run, and each value is let go after its last use. `instead` replaces how the named
        operations compute (to record something on the way). A result may share memory with x: do not write into it.
        Raises ValueError for images of another shape than was traced, UnknownLayer for an unknown name.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(
                f"images of shape {tuple(x.shape)} were given; the network was traced for "
                f"[N, {', '.join(map(str, self.input_shape))}]: resize the images or trace with input_shape"
            )
        return self.run_from({self.input: x}, names, instead)

    def run_from(
        self,
        given: Mapping[str, Tensor],
        names: Collection[str],
        instead: Mapping[str, Callable[..., Any]] | None = None,
    ) -> dict[str, Tensor]:
        """As `run`, from the outputs of any operations that together cut the names off from the input."""
        needed = self.ancestors(names, given)
        if self.input in needed and self.input not in given:
            raise ValueError(f"the outputs of {list(given)} were given; {list(names)} need the input image as well")
        uses = {name: int(name in names) for name in needed}
        for name in needed:
            for source in () if name in given else self.operations[name].inputs:
                uses[source] += 1
        values: dict[str, Any] = {}
        with torch.no_grad(), evaluating(self._model):
            for name in needed:
                if name in given:
                    values[name] = given[name]
                    continue
                op = self.operations[name]
                compute = (instead or {}).get(name, op.compute)
                values[name] = compute(*(values[source] for source in op.inputs))
                for source in op.inputs:
                    uses[source] -= 1
                    if not uses[source]:
                        del values[source]
        return {name: values[name] for name in names}


def average_counts(op: Operation, map_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What an average pool divides by, as two factors: one per output row and one per output column.

    `map_shape` is the (..., rows, columns) of its input. Their outer product is the number of cells that torch's
    AvgPool2d counts: padding counts if the module says so, the overhang of ceil mode never does.
    """
    module, window = op.module, op.window
    assert isinstance(module, nn.AvgPool2d)
    assert window is not None
    factors = []
    for axis in (0, 1):
        size, pad = map_shape[axis - 2], window.pad_before[axis]
        start = torch.arange(op.shape[axis - 2]) * window.stride[axis] - pad
        end = (start + window.kernel[axis]).clamp(max=size + pad)
        if not module.count_include_pad:
            start, end = start.clamp(min=0), end.clamp(max=size)
        factors.append((end - start).double())
    if module.divisor_override is not None:
        factors = [torch.full_like(factors[0], module.divisor_override), torch.ones_like(factors[1])]
    return factors[0], factors[1]


def bins(op: Operation, map_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What a "binpool" averages, as two matrices, rows [rows out, rows in] and columns [columns out, columns in].

    `map_shape` is the (..., rows, columns) of its input: output = rows @ map @ columns.T. Bin i of n over a length of m
    cells is, as torch has it, floor(i m / n) to ceil((i + 1) m / n): bins overlap where n does not divide m, and repeat
    cells where n > m.
    """
    cells_out = op.shape[1:] if len(op.shape) == 3 else (1, 1)
    matrices = []
    for count, length in zip(cells_out, map_shape[-2:], strict=True):
        matrix = torch.zeros(count, length, dtype=torch.float64)
        for i in range(count):
            first, end = i * length // count, -(-(i + 1) * length // count)
            matrix[i, first:end] = 1 / (end - first)
        matrices.append(matrix)
    return matrices[0], matrices[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and their flags put back whatever happens."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
