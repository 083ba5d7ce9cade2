"""Cell of a feature map <-> box of input pixels: integer arithmetic on the traced graph.

A cell of conv5 of ZFNet sees 139 x 139 pixels, and its neighbour the same box 16 pixels further on: Zeiler and Fergus
2014 crop those boxes as the patches of Fig. 2. Padding makes boxes that leave the image; they are not cut here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from zfnet.graph import Graph, Pair

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
    return seen.get(graph.input, _whole(graph, graph.input))


def fields_beneath(graph: Graph, layer: str, inside: bool = False) -> Mapping[str, ReceptiveField]:
    """What one cell of `layer` sees of the layer itself and of every operation beneath it.

    `inside`: a field as large as the map, along an axis, becomes the whole map (jump 0, start 0, its size).
    """
    fields = {graph[layer].name: ReceptiveField((1, 1), (0, 0), (1, 1))}
    if len(graph[layer].shape) != 3:
        fields[layer] = _whole(graph, layer)
    for name in reversed(graph.ancestors([layer])):
        op = graph.operations[name]
        for source in dict.fromkeys(op.inputs):
            below = _one_step_down(graph, name, source, fields[name])
            if source in fields:
                below = _union([fields[source], below], _whole(graph, source))
            fields[source] = _inside(below, _whole(graph, source)) if inside else below
    return fields


def _one_step_down(graph: Graph, name: str, source: str, field: ReceptiveField) -> ReceptiveField:
    """From what is seen of an operation's output to what is seen of one of its inputs."""
    op = graph.operations[name]
    whole = _whole(graph, source)
    if op.pointwise and graph.operations[source].shape[1:] == op.shape[1:] and len(op.shape) == 3:
        return field
    if op.window is None:
        return whole
    jump, start, size = [], [], []
    for axis in (0, 1):
        if field.jump[axis] == 0:
            jump.append(0), start.append(0), size.append(whole.size[axis])
            continue
        stride = op.window.stride[axis]
        jump.append(field.jump[axis] * stride)
        start.append(field.start[axis] * stride - op.window.pad_before[axis])
        size.append((field.size[axis] - 1) * stride + op.window.span[axis])
    return ReceptiveField((jump[0], jump[1]), (start[0], start[1]), (size[0], size[1]))


def _whole(graph: Graph, name: str) -> ReceptiveField:
    """The whole map of an operation; units and values are a map of one cell."""
    shape = graph.operations[name].shape
    rows, cols = shape[1:] if len(shape) == 3 else (1, 1)
    return ReceptiveField((0, 0), (0, 0), (rows, cols))


def _union(fields: Iterable[ReceptiveField], whole: ReceptiveField) -> ReceptiveField:
    """Smallest field that holds all; branches that move at different speeds have none but the whole map."""
    fields = list(fields)
    axes = []
    for axis in (0, 1):
        jumps = {field.jump[axis] for field in fields}
        start = min(field.start[axis] for field in fields)
        end = max(field.start[axis] + field.size[axis] for field in fields)
        axes.append((jumps.pop(), start, end - start) if len(jumps) == 1 else (0, 0, whole.size[axis]))
    (jr, sr, nr), (jc, sc, nc) = axes
    return ReceptiveField((jr, jc), (sr, sc), (nr, nc))


def _inside(field: ReceptiveField, whole: ReceptiveField) -> ReceptiveField:
    """The field, with the whole map along each axis on which it is as large as the map."""
    axes = [
        (field.jump[a], field.start[a], field.size[a]) if field.size[a] < whole.size[a] else (0, 0, whole.size[a])
        for a in (0, 1)
    ]
    (jr, sr, nr), (jc, sc, nc) = axes
    return ReceptiveField((jr, jc), (sr, sc), (nr, nc))
