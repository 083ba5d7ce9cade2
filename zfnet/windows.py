"""Windows of maps, one for each of many cells: cut out of maps, moved onto other windows, cleared beside the map.

A window is what one cell sees of a map (`zfnet.receptive`). It may leave the map. Everything here works on all windows
of one layer's cells at once, on any device, and keeps the feature maps innermost in memory ("channels last"), which is
how the windows are cut fastest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from zfnet.graph import Operation, Pair, average_counts
from zfnet.receptive import ReceptiveField


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the windows of M cells lie; three integer tensors [M] on one device."""

    image: Tensor
    row: Tensor
    col: Tensor

    @cached_property
    def own(self) -> Tensor:
        """[M]: the numbers of the windows themselves."""
        return torch.arange(len(self.image), device=self.image.device)

    def lines(self, field: ReceptiveField, axis: int) -> Tensor:
        """[M, size]: the rows (axis 0) or columns (axis 1) of the map that each window covers."""
        cell = (self.row, self.col)[axis]
        first = field.start[axis] + field.jump[axis] * cell
        return first[:, None] + torch.arange(field.size[axis], device=cell.device)

    def beside(self, field: ReceptiveField, map_size: Pair) -> Tensor | None:
        """[M, 1, height, width]: which cells of the windows are not on the map; None where all of them are."""
        return _outside(self.lines(field, 0), self.lines(field, 1), map_size)

    def clear_beside_(self, values: Tensor, field: ReceptiveField, map_size: Pair, value: float = 0) -> Tensor:
        """Fill, in place, what of the windows lies beside the map."""
        beside = self.beside(field, map_size)
        return values if beside is None else values.masked_fill_(beside, value)

    def divisors(self, op: Operation, field: ReceptiveField, map_shape: Sequence[int], like: Tensor) -> Tensor:
        """[M, 1, height, width]: what an average pool divides by in the windows of its output."""
        counts = average_counts(op, map_shape)
        rows, cols = (
            count.to(like.device, like.dtype)[self.lines(field, axis).clamp(0, len(count) - 1)]
            for axis, count in enumerate(counts)
        )
        return (rows[:, :, None] * cols[:, None, :])[:, None]

    def cut(self, maps: Tensor, field: ReceptiveField, fill: float = 0) -> Tensor:
        """Windows [M, C, height, width] of the whole maps [N, C, rows, cols] of the images; `fill` beside the map."""
        whole = (maps.shape[2], maps.shape[3])
        if field == ReceptiveField((0, 0), (0, 0), whole):
            return maps[self.image]
        return _gather(maps, self.image, self.lines(field, 0), self.lines(field, 1), fill)

    def move(self, values: Tensor, where: ReceptiveField, wanted: ReceptiveField) -> Tensor:
        """Cut the windows `where` [M, C, ...], or fill them up with zeros, to the windows `wanted`."""
        if where == wanted:
            return values
        if where.jump == wanted.jump:
            before = [s - t for s, t in zip(where.start, wanted.start, strict=True)]
            after = [w - n - b for w, n, b in zip(wanted.size, where.size, before, strict=True)]
            return F.pad(values, (before[1], after[1], before[0], after[0]))
        rows, cols = (self.lines(wanted, axis) - self.lines(where, axis)[:, :1] for axis in (0, 1))
        return _gather(values, self.own, rows, cols, 0)


def _gather(maps: Tensor, index: Tensor, rows: Tensor, cols: Tensor, fill: float) -> Tensor:
    """[M, C, height, width]: of maps[index[m]] the rows[m] and cols[m]; `fill` where there are none."""
    inside = rows.clamp(0, maps.shape[2] - 1)[:, :, None], cols.clamp(0, maps.shape[3] - 1)[:, None, :]
    windows = maps.permute(0, 2, 3, 1)[(index[:, None, None], *inside)].contiguous().permute(0, 3, 1, 2)
    outside = _outside(rows, cols, (maps.shape[2], maps.shape[3]))
    return windows if outside is None else windows.masked_fill_(outside, fill)


def _outside(rows: Tensor, cols: Tensor, size: Pair) -> Tensor | None:
    off_rows, off_cols = ((line < 0) | (line >= length) for line, length in zip((rows, cols), size, strict=True))
    if not (off_rows.any() or off_cols.any()):
        return None
    return (off_rows[:, :, None] | off_cols[:, None, :])[:, None]
