"""One pass over a layer's cells for the strongest cell, the sum and the number of active cells of every map.

It may be the layer's ReLU as well, which by itself moves all cells through memory once more. Two ways to the same
numbers: `compiled`, machine code by Numba for the CPU, which reads the activations once; and `vectorised`, torch's own
operations for a GPU and for other types of number, which read them four times. The compiled one adds in the order of
the cells, whatever the processor, so its sums are the same bit for bit on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Reduced(NamedTuple):
    """Of cells [N, H, W, C]."""

    value: npt.NDArray[np.float32]  # [N, C] the largest
    position: npt.NDArray[np.int32]  # [N, C] row * W + column of the first that is largest
    total: npt.NDArray[np.float64]  # [C] the sum, in float32 within a row of a map only
    active: npt.NDArray[np.int64]  # [C] the number above zero


def reduce_cells(cells: Tensor, rectify: bool = False) -> Reduced:
    """The reduction of contiguous cells [N, H, W, C], maps innermost, on the device that holds them.

    With `rectify` their ReLU is taken first, in place. Where a cell is NaN or infinite the total of its map is too; the
    map's other numbers then mean nothing.
    """
    if cells.device.type == "cpu" and cells.dtype == torch.float32:
        return compiled(cells, rectify)
    return vectorised(cells.relu_() if rectify else cells)


def compiled(cells: Tensor, rectify: bool = False) -> Reduced:
    """The reduction of float32 cells [N, H, W, C] in the memory of the CPU, in one pass by the calling thread."""
    images, _, _, maps = cells.shape
    reduced = Reduced(
        np.empty((images, maps), np.float32), np.zeros((images, maps), np.int32), np.zeros(maps), np.zeros(maps, int)
    )
    _kernel()(cells.detach().numpy(), rectify, *reduced)
    return reduced


def vectorised(cells: Tensor) -> Reduced:
    """The reduction of cells [N, H, W, C] on any device, by torch."""
    columns = cells.shape[2]
    largest = cells.amax(2)
    # The first row that holds the maximum, and in it the first column: torch.max documents the first of equals.
    row = largest.max(1).indices
    held = cells.gather(1, row[:, None, None].expand(-1, 1, columns, -1))[:, 0]
    value, column = held.max(1)
    return Reduced(
        value.to(torch.float32).cpu().numpy(),
        (row * columns + column).to(torch.int32).cpu().numpy(),
        cells.sum(2).sum((0, 1), dtype=torch.float64).cpu().numpy(),
        (cells > 0).sum((0, 1, 2)).cpu().numpy(),
    )


@functools.cache
def _kernel() -> Callable[..., None]:
    """`_reduce` as machine code that lets other threads run; kept on disk where Numba finds a place to write."""
    import numba  # here, so that a GPU does without

    translate = functools.partial(numba.njit, nogil=True, error_model="numpy")
    try:
        return translate(cache=True)(_reduce)
    except RuntimeError:  # no folder for the cache: half a second more in each process
        return translate()(_reduce)


def _reduce(cells: Any, rectify: bool, value: Any, position: Any, total: Any, active: Any) -> None:
    images, rows, columns, maps = cells.shape
    of_row = np.empty(maps, np.float32)
    count = np.empty(maps, np.int32)
    for image in range(images):
        best, place = value[image], position[image]
        best[:] = -np.inf
        count[:] = 0
        for row in range(rows):
            of_row[:] = 0
            for column in range(columns):
                here = np.int32(row * columns + column)
                for c in range(maps):  # innermost, as they lie in memory: the loop that becomes vector instructions
                    cell = cells[image, row, column, c]
                    if rectify:
                        cell = np.float32(0) if cell < 0 else cell  # NaN and -0 stay, as torch.relu leaves them
                        cells[image, row, column, c] = cell
                    of_row[c] += cell
                    count[c] += np.int32(cell > 0)
                    stronger = cell > best[c]
                    best[c] = cell if stronger else best[c]
                    place[c] = here if stronger else place[c]
            for c in range(maps):
                total[c] += of_row[c]
        for c in range(maps):
            active[c] += count[c]
