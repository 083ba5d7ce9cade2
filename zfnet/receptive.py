"""Cell of a feature map <-> box of input pixels: integer arithmetic on the traced graph.

A cell of conv5 of ZFNet sees 139 x 139 pixels, and its neighbour the same box 16 pixels further on: Zeiler and Fergus
2014 crop those boxes as the patches of Fig. 2. Padding makes boxes that leave the image; they are not cut here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from zfnet.graph import Graph, Pair, Window

Index = TypeVar("Index", int, np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class ReceptiveField:
    """What the cells of one map see of another (by default: of the input image); every pair is (rows, columns).

    Cell i sees [start + jump * i, start + jump * i + size) along each axis. A jump of 0: every cell sees the whole.
    """

    jump: Pair
    start: Pair
    size: Pair

    def box(self, row: Index, col: Index) -> tuple[Index, Index, int, int]:
        """(top, left, height, width) of what the cell (row, col) sees; it may leave the image.

        Takes integers, or numpy arrays or torch tensors of integers, which give arrays of tops and of lefts.
        """
        top = self.start[0] + self.jump[0] * row
        left = self.start[1] + self.jump[1] * col
        return top, left, self.size[0], self.size[1]


def receptive_field(graph: Graph, layer: str) -> ReceptiveField:
    """The pixels of the input image that a cell of the layer (or of any traced operation) may depend on.

    Where branches join, the smallest box that holds the boxes of all of them. The whole image for fully connected
    layers and above any operation whose windows are not known. Raises UnknownLayer for an unknown name.
    """
    seen = fields_beneath(graph, layer)
    return seen.get(graph.input, whole_map(graph, graph.input))


def fields_beneath(graph: Graph, layer: str, inside: bool = False) -> Mapping[str, ReceptiveField]:
    """What one cell of `layer` sees of the layer itself and of every operation beneath it.

    `inside`: a field as large as the map, along an axis, becomes the whole map (jump 0, start 0, its size).
    """
    fields = {graph[layer].name: ReceptiveField((1, 1), (0, 0), (1, 1))}
    if len(graph[layer].shape) != 3:
        fields[layer] = whole_map(graph, layer)
    for name in reversed(graph.ancestors([layer])):
        op = graph.operations[name]
        for source in dict.fromkeys(op.inputs):
            below = _one_step_down(graph, name, source, fields[name])
            if source in fields:
                below = _union(fields[source], below, whole_map(graph, source))
            fields[source] = _inside(below, whole_map(graph, source)) if inside else below
    return fields


def beneath(field: ReceptiveField, window: Window) -> ReceptiveField:
    """What cells that see `field` of a window's output see of its input, where it lies on the map and beside it."""
    axes = [
        (jump * stride, start * stride - before, (size - 1) * stride + span)
        for (jump, start, size), stride, before, span in zip(
            _axes(field), window.stride, window.pad_before, window.span, strict=True
        )
    ]
    return _field(axes)


def _one_step_down(graph: Graph, name: str, source: str, field: ReceptiveField) -> ReceptiveField:
    """From what is seen of an operation's output to what is seen of one of its inputs."""
    op, whole = graph.operations[name], whole_map(graph, source)
    if op.pointwise and len(op.shape) == 3 and graph.operations[source].shape[1:] == op.shape[1:]:
        return field
    if op.window is None:
        return whole
    below = zip(_axes(beneath(field, op.window)), _axes(whole), strict=True)
    return _field([axis if axis[0] else all_of_it for axis, all_of_it in below])


def whole_map(graph: Graph, name: str) -> ReceptiveField:
    """The whole map of an operation, whatever the cell; units and values are a map of one cell."""
    shape = graph.operations[name].shape
    rows, cols = shape[1:] if len(shape) == 3 else (1, 1)
    return ReceptiveField((0, 0), (0, 0), (rows, cols))


def _union(one: ReceptiveField, other: ReceptiveField, whole: ReceptiveField) -> ReceptiveField:
    """Smallest field that holds both; branches that move at different speeds have none but the whole map."""
    axes = []
    for a, b, all_of_it in zip(_axes(one), _axes(other), _axes(whole), strict=True):
        start, end = min(a[1], b[1]), max(a[1] + a[2], b[1] + b[2])
        axes.append((a[0], start, end - start) if a[0] == b[0] else all_of_it)
    return _field(axes)


def _inside(field: ReceptiveField, whole: ReceptiveField) -> ReceptiveField:
    """The field, with the whole map along each axis on which it is as large as the map."""
    pairs = zip(_axes(field), _axes(whole), strict=True)
    return _field([axis if axis[2] < all_of_it[2] else all_of_it for axis, all_of_it in pairs])


def _axes(field: ReceptiveField) -> list[tuple[int, int, int]]:
    """(jump, start, size) of the rows and of the columns."""
    return list(zip(field.jump, field.start, field.size, strict=True))


def _field(axes: list[tuple[int, int, int]]) -> ReceptiveField:
    jump, start, size = zip(*axes, strict=True)
    return ReceptiveField(jump, start, size)
