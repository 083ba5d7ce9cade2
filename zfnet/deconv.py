"""Projections: what in an image made a cell fire, drawn in its pixels, for many cells at once.

Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, Sec. 2.1: run the image forward
and keep the switches of every max pool; set every activation of the layer but one to zero; then, down to the pixels,
unpool with the switches, rectify, and filter with the transposed filters. There is no bias, no contrast normalisation
and no rectification of the pixels themselves.

A cell depends on its receptive field alone, so only that window of each map is carried down: one cell of ZFNet's
conv5 touches 3 x 3 cells of conv4 and 139 x 139 pixels. Windows of many cells of one layer go down together. Where the
window is as large as the map, it is the map. Residual sums and concatenations carry windows along each branch, and add
them up. An image in which few cells are projected is run forward over their windows alone (`project_images`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zfnet.ascent import Keep, run_whole, run_windows
from zfnet.descent import WAYS_DOWN, Descent, Kept, Semantics, first_filter
from zfnet.graph import Graph, Operation
from zfnet.receptive import ReceptiveField, fields_beneath, receptive_field, whole_map
from zfnet.windows import Windows

__all__ = [
    "MEMORY_MB", "Cells", "Projected", "Projections", "Record", "Semantics", "Unprojectable", "multiply_adds",
    "project", "project_images", "record",
]  # fmt: skip

MEMORY_MB = 64.0
"""Memory that windows on their way may take together, unless told otherwise."""


class Unprojectable(ValueError):
    """Operations beneath the layer have no known way down."""


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


class Projected(NamedTuple):
    """Some cells of a layer, as `project_images` gives them."""

    layer: str
    which: Tensor
    """[m]: which of the layer's cells."""
    activation: Tensor
    """[m]: their activations."""
    projections: Projections


@dataclass(frozen=True, eq=False)
class Record:
    """One forward pass of N images: the layers' activations, and what the way down needs of each image."""

    graph: Graph
    semantics: Semantics
    images: int
    activations: dict[str, Tensor]
    kept: Keep

    def activation(self, layer: str) -> Tensor:
        """[N, maps, rows, cols] of a recorded layer, after its batch norm and ReLU; units have maps of 1 x 1."""
        if layer not in self.activations:
            raise ValueError(
                f"{layer!r} was not recorded, only {', '.join(self.activations)}: name it in record(layers=)"
            )
        return _as_maps(self.activations[layer])


def record(graph: Graph, images: Tensor, layers: Sequence[str], semantics: Semantics | None = None) -> Record:
    """Run images [N, channels, rows, cols] forward once, for projections from any of the layers.

    Raises UnknownLayer for a name that is not of the network, Unprojectable where the way down is not known.
    """
    semantics = semantics or Semantics()
    targets = {layer: graph.activation_of(layer) for layer in layers}
    for layer, target in targets.items():
        _check_way_down(graph, layer, target)
    outputs, kept = run_whole(graph, images, list(targets.values()), semantics)
    activations = {layer: outputs[target] for layer, target in targets.items()}
    return Record(graph, semantics, len(images), activations, kept)


@torch.no_grad()
def project(record: Record, layer: str, cells: Cells, memory_mb: float = MEMORY_MB) -> Projections:
    """Project cells of a recorded layer, each alone, down to the pixels of its receptive field.

    With the semantics cells="all" each projection is that of the whole feature map, over the whole image, and the
    cells' rows and columns do not matter. Windows on their way take `memory_mb` megabytes of memory, or as much as a
    single one needs; beside rounding the result does not depend on it. The same call gives the same bits (on CUDA under
    torch.use_deterministic_algorithms, for the sums of unpooling). Raises ValueError for a layer that was not recorded
    and for cells that are not on its maps.
    """
    activation = record.activation(layer)
    cells = _checked(cells, activation.shape, layer, activation.device)
    route = _Route.of(record.graph, layer, record.semantics)
    top, left, height, width = route.seen.box(*route.places(cells))
    pixels = activation.new_zeros(len(cells.row), record.graph.input_shape[0], height, width)
    for some in _batches(len(pixels), route.together(memory_mb, activation)):
        pixels[some] = route.down_from_record(record, activation, Cells(*(index[some] for index in cells)))
    return Projections(pixels, top, left)


@torch.no_grad()
def project_images(
    graph: Graph,
    images: Tensor,
    cells: Mapping[str, Cells],
    semantics: Semantics | None = None,
    memory_mb: float = MEMORY_MB,
) -> Iterator[Projected]:
    """Run images [N, channels, rows, cols] forward, and project cells of any layers in them, some at a time.

    Each image is run at most once, and no further than its cells need: whole, or over the windows of its cells alone,
    whichever takes fewer multiply-adds. The cells of a layer come in no particular order; `Projected.which` tells.
    Memory is that of the images' forward pass and `memory_mb`, as in `project`, and does not grow with the cells.
    Raises as `record` and `project` do.
    """
    semantics, images = semantics or Semantics(), images.contiguous(memory_format=torch.channels_last)
    if not cells:
        return
    routes = {layer: _Route.of(graph, layer, semantics) for layer in cells}
    cells = {
        layer: _checked(some, (len(images), *_map_shape(graph, routes[layer].target)), layer, images.device)
        for layer, some in cells.items()
    }
    groups, alone = _grouped(graph, routes, cells, len(images))
    for needed, members in groups:
        kept = record(graph, images[members], needed, semantics)
        number = torch.full((len(images),), -1, device=images.device)
        number[members] = torch.arange(len(members), device=images.device)
        for layer in needed:
            index = (number[cells[layer].image] >= 0).nonzero().flatten()
            for some in _batches(len(index), routes[layer].together(memory_mb, images)):
                chosen = Cells(*(column[index[some]] for column in cells[layer]))
                within = chosen._replace(image=number[chosen.image])
                activation = kept.activation(layer)
                pixels = routes[layer].down_from_record(kept, activation, within)
                yield routes[layer].projected(layer, index[some], activation[tuple(within)], pixels, chosen)
    for layer, route in routes.items():
        index = alone[cells[layer].image].nonzero().flatten()
        for some in _batches(len(index), route.together(memory_mb, images)):
            chosen = Cells(*(column[index[some]] for column in cells[layer]))
            activation, pixels = route.up_and_down(images, chosen)
            yield route.projected(layer, index[some], activation, pixels, chosen)


def multiply_adds(
    graph: Graph, images: int, cells: Mapping[str, Cells], semantics: Semantics | None = None
) -> tuple[int, int]:
    """What `project_images` does, counted: multiply-adds of all forward passes, and of all ways down."""
    routes = {layer: _Route.of(graph, layer, semantics or Semantics()) for layer in cells}
    down = {layer: route.multiply_adds * len(cells[layer].image) for layer, route in routes.items()}
    groups, alone = _grouped(graph, routes, cells, images)
    up = sum(routes[layer].multiply_adds * int(alone[some.image].sum()) for layer, some in cells.items())
    for needed, members in groups:
        names = graph.ancestors([routes[layer].target for layer in needed])
        up += len(members) * sum(graph.operations[name].multiply_adds() for name in names)
    return up, sum(down.values())


# --- what is run ------------------------------------------------------------------------------------------------------


def _grouped(
    graph: Graph, routes: Mapping[str, "_Route"], cells: Mapping[str, Cells], images: int
) -> tuple[list[tuple[list[str], Tensor]], Tensor]:
    """The layers and image numbers that are run whole together, and [N] which images are run over windows alone."""
    counts = torch.stack([torch.bincount(some.image, minlength=images) for some in cells.values()])
    in_windows = torch.tensor([route.multiply_adds for route in routes.values()], device=counts.device)
    groups: dict[tuple[str, ...], list[int]] = {}
    alone = torch.zeros(images, dtype=torch.bool, device=counts.device)
    for number, (row, windows) in enumerate(zip(counts.T.tolist(), (in_windows @ counts).tolist(), strict=True)):
        needed = graph.ancestors([route.target for route, count in zip(routes.values(), row, strict=True) if count])
        if windows < sum(graph.operations[name].multiply_adds() for name in needed):
            alone[number] = True
        elif needed:
            groups.setdefault(needed, []).append(number)
    whole = [
        ([layer for layer, route in routes.items() if route.target in needed], torch.tensor(members).to(counts.device))
        for needed, members in groups.items()
    ]
    return whole, alone


def _batches(count: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(first, first + size) for first in range(0, count, size))


@dataclass(frozen=True, eq=False)
class _Route:
    """The way of a layer's cells to the pixels, and back."""

    graph: Graph
    semantics: Semantics
    target: str
    """The operation whose output is the layer's activation."""
    plan: Mapping[str, ReceptiveField]
    """Of every operation beneath: the window of its map that is carried."""
    seen: ReceptiveField
    """The pixels of a projection."""

    @classmethod
    def of(cls, graph: Graph, layer: str, semantics: Semantics) -> "_Route":
        target = graph.activation_of(layer)
        _check_way_down(graph, layer, target)
        if semantics.cells == "all":
            plan = {name: whole_map(graph, name) for name in graph.ancestors([target])}
            return cls(graph, semantics, target, plan, whole_map(graph, graph.input))
        plan = dict(fields_beneath(graph, target, inside=True))
        return cls(graph, semantics, target, plan, receptive_field(graph, target))

    def places(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """Rows and columns by which the windows are found."""
        if self.semantics.cells == "all":
            return torch.zeros_like(cells.row), torch.zeros_like(cells.col)
        return cells.row, cells.col

    def projected(self, layer: str, index: Tensor, activation: Tensor, pixels: Tensor, cells: Cells) -> Projected:
        """The cells' projections with the places of their windows."""
        top, left, _, _ = self.seen.box(*self.places(cells))
        return Projected(layer, index, activation, Projections(pixels, top, left))

    def down_from_record(self, record: Record, activation: Tensor, cells: Cells) -> Tensor:
        """Pixels [M, channels, height, width] of cells in recorded images."""
        windows = Windows(cells.image, *self.places(cells))

        def kept(name: str, field: ReceptiveField, fill: int) -> Tensor:
            whole = record.kept[name]
            return whole[windows.image] if whole.ndim == 2 else windows.cut(whole, field, fill)

        if self.semantics.cells == "all":
            values = activation[cells.image, cells.feature_map]
        else:
            values = activation[tuple(cells)][:, None, None]
        return self._down(windows, cells.feature_map, values, kept)

    def up_and_down(self, images: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Activations [M] and pixels [M, channels, height, width] of cells in images that are not run whole."""
        windows = Windows(cells.image, cells.row, cells.col)
        output, kept = run_windows(self.graph, images, self.target, self.plan, windows, self.semantics)
        values = _as_maps(output)[windows.own, cells.feature_map]
        pixels = self._down(windows, cells.feature_map, values, lambda name, field, fill: kept[name])
        return values[:, 0, 0], pixels

    def _down(self, windows: Windows, feature_map: Tensor, values: Tensor, kept: Kept) -> Tensor:
        seed = torch.ones_like(values) if self.semantics.seed == "one" else values
        first = first_filter(self.graph, self.target)
        descent = Descent(self.graph, self.semantics, self.plan, windows, feature_map, kept, first)
        return descent.to_pixels(self.target, seed, self.seen)

    @property
    def multiply_adds(self) -> int:
        """Of running one cell's windows forward; as many as of the whole image where that is the only way.

        The other rules of unpooling ask for the switches beside the windows, too.
        """
        whole = self.semantics.cells == "all" or self.semantics.unpool != "sum"
        return sum(
            self.graph.operations[name].multiply_adds(None if whole else math.prod(field.size))
            for name, field in self.plan.items()
        )

    def together(self, memory_mb: float, like: Tensor) -> int:
        """How many windows of such numbers are in memory at a time."""
        return int(memory_mb * 2**20) // self._bytes_of_window(like.element_size())

    def _bytes_of_window(self, element: int) -> int:
        """Memory that one window takes on its way at most, the signals that wait on other branches included."""
        waiting: set[str] = set()
        peak = 1
        for name in reversed(self.graph.ancestors([self.target])):
            op = self.graph.operations[name]
            waiting = (waiting - {name}) | set(op.inputs)
            step = sum(self._cells_of(one) for one in (name, *op.inputs))
            indices = _BYTES_OF_INDICES * self._cells_of(name) if op.kind == "maxpool" else 0
            peak = max(peak, element * (2 * step + sum(map(self._cells_of, waiting))) + indices)
        return peak

    def _cells_of(self, name: str) -> int:
        """Cells of an operation's window, in all its maps."""
        shape, (rows, cols) = self.graph.operations[name].shape, self.plan[name].size
        return (shape[0] if shape else 1) * rows * cols


_BYTES_OF_INDICES = 24
"""A switch is three integers of 8 bytes where it is made and where it is used."""


# --- checks -----------------------------------------------------------------------------------------------------------


def _as_maps(activation: Tensor) -> Tensor:
    return activation if activation.ndim == 4 else activation[:, :, None, None]


def _map_shape(graph: Graph, name: str) -> tuple[int, ...]:
    shape = graph.operations[name].shape
    return shape if len(shape) == 3 else (*shape, 1, 1)


def _check_way_down(graph: Graph, layer: str, target: str) -> None:
    beneath_it = [graph.operations[name] for name in graph.ancestors([target])]
    foreign = [
        f"{op.name} ({type(op.module).__name__ if op.module else op.kind})" for op in beneath_it if not _known(op)
    ]
    if foreign:
        raise Unprojectable(
            f"layer {layer!r} cannot be projected: beneath it are {', '.join(foreign)}, whose way down is not known. "
            f"Expected only {', '.join(WAYS_DOWN)}: choose a layer beneath them"
        )


def _known(op: Operation) -> bool:
    return op.kind in WAYS_DOWN or op.kind == "input"


def _checked(cells: Cells, shape: Sequence[int], layer: str, device: torch.device) -> Cells:
    """The cells on the device. Raises ValueError for cells that are not on the maps of [images, maps, rows, cols]."""
    cells = Cells(*(torch.as_tensor(index, device=device) for index in cells))
    if len({len(index) for index in cells}) > 1 or any(index.is_floating_point() for index in cells):
        raise ValueError(f"cells need four integer tensors of one length; lengths {[len(i) for i in cells]} were given")
    for name, index, size in zip(Cells._fields, cells, shape, strict=True):
        wrong = index[(index < 0) | (index >= size)]
        if len(wrong):
            raise ValueError(f"{name} {int(wrong[0])} was given; layer {layer!r} has 0 to {size - 1}")
    return cells
