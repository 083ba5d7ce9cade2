"""The strongest cell of every feature map, and the states that find the top k over a data set.

ZFNet section 4 and figure 2: for each feature map the nine images that excite it most. Everything here is defined
so that no accident of batching, sharding or retrying can change an answer: top-k has a total order (activation
descending, key ascending, row, col), its merge is associative, commutative and idempotent, and quantiles come from
integer counts over bins that are fixed for all time.

Samples are integers whose order is the order of their keys; -1 never occurs, `NONE` marks an empty place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NONE = np.iinfo(np.int64).max
"""Sample number of an empty place of a TopK; sorts last."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# The bins of the histograms: the leading bits of a positive float32, sixteen bins to an octave (6 % wide).
_SHIFT = 23 - 4
LOWEST, HIGHEST = 2.0**-20, 2.0**20
_FIRST = int(np.float32(LOWEST).view(np.int32)) >> _SHIFT
BINS = (int(np.float32(HIGHEST).view(np.int32)) >> _SHIFT) - _FIRST


class NotFinite(ValueError):
    """An activation is NaN or infinite; `index` is the image's place in the batch."""

    def __init__(self, index: int, feature_map: int) -> None:
        super().__init__(f"feature map {feature_map} of image {index} of the batch is NaN or infinite")
        self.index = index
        self.feature_map = feature_map


class Strongest(NamedTuple):
    """The strongest cell of every feature map of every image of a batch, and what its statistics need."""

    value: Floats  # [N, C] activation
    row: Ints  # [N, C]
    col: Ints  # [N, C]
    total: npt.NDArray[np.float64]  # [N, C] sum over the map's cells
    active: Ints  # [N, C] cells above zero
    cells: int  # cells of a map


def strongest(activation: Tensor) -> Strongest:
    """The strongest cell of every map; of equal cells the first in row-major order.

    Args:
        activation: [N, C, H, W], or [N, C] of a fully connected layer (1x1 maps).

    Raises: NotFinite where an activation is NaN or infinite: it would sort nowhere.
    """
    if activation.dim() == 2:
        activation = activation[:, :, None, None]
    width = activation.shape[-1]
    flat = activation.flatten(2)
    total = flat.sum(-1, dtype=torch.float64)
    if not bool(torch.isfinite(total).all()):
        index, feature_map = (int(v) for v in (~torch.isfinite(total)).nonzero()[0])
        raise NotFinite(index, feature_map)
    value, position = flat.max(-1)  # documented: the first of equal maxima
    place: Ints = position.cpu().numpy()
    return Strongest(
        value=value.to(torch.float32).cpu().numpy(),
        row=place // width,
        col=place % width,
        total=total.cpu().numpy(),
        active=(flat > 0).sum(-1).cpu().numpy(),
        cells=flat.shape[-1],
    )


@dataclass(frozen=True, eq=False)
class TopK:
    """The k strongest images of every feature map so far. All arrays are [C, k], best first.

    Empty places hold sample NONE and activation 0: an entry needs an activation above zero, so a dead map has none.
    """

    activation: Floats
    sample: Ints
    row: Ints
    col: Ints

    @property
    def k(self) -> int:
        """Places per map."""
        return int(self.activation.shape[1])

    @classmethod
    def of(cls, found: Strongest, samples: Ints, k: int) -> TopK:
        """The state of one batch. `samples` [N] are the numbers of its images."""
        every = np.broadcast_to(samples, found.value.T.shape)
        return _best(TopK(found.value.T, every, found.row.T, found.col.T), k)

    @classmethod
    def merge(cls, states: list[TopK]) -> TopK:
        """One state of several, in any order and with repetitions.

        Raises: ValueError for no state, or states of different k.
        """
        if len({state.k for state in states}) != 1:
            raise ValueError(f"given states of k = {[s.k for s in states]}: merge one or more states of one k")
        columns = ("activation", "sample", "row", "col")
        joined = TopK(*(np.concatenate([getattr(s, name) for s in states], axis=1) for name in columns))
        return _best(joined, states[0].k)


def _best(state: TopK, k: int) -> TopK:
    """The first k places in the total order, one for each sample, padded with empty places."""
    dead = ~(state.activation > 0)
    activation = np.where(dead, np.float32(0), state.activation)
    sample = np.where(dead, NONE, state.sample)
    row, col = np.where(dead, 0, state.row), np.where(dead, 0, state.col)
    order = np.lexsort((col, row, sample, -activation), axis=-1)
    columns = [np.take_along_axis(column, order, axis=1) for column in (activation, sample, row, col)]
    keep = _first_of_each_sample(columns[1])
    maps, places = keep.shape
    best = TopK(np.zeros((maps, k), np.float32), np.full((maps, k), NONE), *np.zeros((2, maps, k), np.int64))
    first = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, first, axis=1)
    targets: tuple[npt.NDArray[Any], ...] = (best.activation, best.sample, best.row, best.col)
    for target, column in zip(targets, columns, strict=True):
        target[:, : min(k, places)][kept] = np.take_along_axis(column, first, axis=1)[kept]
    return best


def _first_of_each_sample(sample: Ints) -> npt.NDArray[np.bool_]:
    """[C, M]: of sorted places, which are the first of a sample (and not empty)."""
    by_sample = np.argsort(sample, axis=1, kind="stable")
    ordered = np.take_along_axis(sample, by_sample, axis=1)
    first: npt.NDArray[np.bool_] = ordered != NONE
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    keep = np.zeros_like(first)
    np.put_along_axis(keep, by_sample, first, axis=1)
    return keep


@dataclass(frozen=True, eq=False)
class Statistics:
    """Counts and sums of every feature map over a set of images; arrays are [C, ...]."""

    images: int
    cells: int
    """Cells of one map."""
    total: npt.NDArray[np.float64]
    """[C] sum of all activations of the map."""
    maximum: Floats
    """[C] largest activation."""
    active_images: Ints
    """[C] images with any activation above zero."""
    active_cells: Ints
    """[C] cells above zero."""
    histogram: Ints
    """[C, BINS] images by the activation of their strongest cell, where above zero."""

    @classmethod
    def of(cls, found: Strongest) -> Statistics:
        """The statistics of one batch."""
        images, maps = found.value.shape
        histogram = np.zeros((maps, BINS), dtype=np.int64)
        alive = found.value > 0
        feature_map = np.broadcast_to(np.arange(maps), (images, maps))[alive]
        np.add.at(histogram, (feature_map, bin_of(found.value[alive])), 1)
        return cls(
            images=images,
            cells=found.cells,
            total=found.total.sum(0),
            maximum=found.value.max(0),
            active_images=alive.sum(0),
            active_cells=found.active.sum(0),
            histogram=histogram,
        )

    @classmethod
    def merge(cls, parts: list[Statistics]) -> Statistics:
        """The statistics of several disjoint sets of images. Sums are added in the order given: fix that order."""
        total = parts[0].total.copy()
        for part in parts[1:]:
            total += part.total
        return cls(
            images=sum(part.images for part in parts),
            cells=parts[0].cells,
            total=total,
            maximum=np.max([part.maximum for part in parts], axis=0),
            active_images=np.sum([part.active_images for part in parts], axis=0),
            active_cells=np.sum([part.active_cells for part in parts], axis=0),
            histogram=np.sum([part.histogram for part in parts], axis=0),
        )

    def quantiles(self, shares: tuple[float, ...]) -> npt.NDArray[np.float32]:
        """[C, len(shares)]: the activation that a share of the images' strongest cells does not exceed.

        It is the upper edge of the bin in which the quantile lies (6 % wide), at most the maximum; 0 where that
        share of the images has no activation above zero.
        """
        silent = self.images - self.active_images
        counts = silent[:, None] + self.histogram.cumsum(1)
        result = np.zeros((len(self.maximum), len(shares)), dtype=np.float32)
        for column, share in enumerate(shares):
            need = int(np.ceil(share * self.images))
            bin_ = (counts < need).sum(1)
            upper = edges()[np.minimum(bin_, BINS - 1) + 1]
            result[:, column] = np.where(silent >= need, 0, np.minimum(upper, self.maximum))
        return result


def bin_of(activation: Floats) -> Ints:
    """The histogram's bin of positive activations; the outer bins take what lies beyond LOWEST and HIGHEST."""
    bits = np.ascontiguousarray(activation, dtype=np.float32).view(np.int32) >> _SHIFT
    return np.clip(bits.astype(np.int64) - _FIRST, 0, BINS - 1)


def edges() -> Floats:
    """[BINS + 1] edges of the bins; bin i holds activations in [edges[i], edges[i + 1])."""
    return ((np.arange(BINS + 1, dtype=np.int32) + _FIRST) << _SHIFT).astype(np.int32).view(np.float32)
