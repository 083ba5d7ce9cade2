"""The strongest cell of every feature map, and the states that find the top k over a data set.

ZFNet section 4 and figure 2: for each feature map the nine images that excite it most. Everything here is defined
so that no accident of batching, sharding or retrying can change an answer: top-k has a total order (activation
descending, key ascending, row, col), its merge is associative, commutative and idempotent, and quantiles come from
integer counts over bins that are fixed for all time.

Samples are integers whose order is the order of their keys; -1 never occurs, `NONE` marks an empty place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zfnet.graph import Graph
from zfnet.reduction import reduce_cells

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


@dataclass(frozen=True, eq=False)
class Strongest:
    """The strongest cell of every feature map of every image, and what the statistics need besides."""

    value: Floats  # [N, C] activation
    position: npt.NDArray[np.int32]  # [N, C] row * columns + col
    total: npt.NDArray[np.float64]  # [C] sum over all cells of all images
    active: Ints  # [C] cells above zero, of all images
    shape: tuple[int, int]  # rows and columns of a map

    @property
    def cells(self) -> int:
        """Cells of a map."""
        return self.shape[0] * self.shape[1]

    @classmethod
    def join(cls, batches: list[Strongest]) -> Strongest:
        """All images of several batches of one layer, in the order given."""
        total = batches[0].total.copy()
        for batch in batches[1:]:
            total += batch.total
        return cls(
            value=np.concatenate([batch.value for batch in batches]),
            position=np.concatenate([batch.position for batch in batches]),
            total=total,
            active=np.sum([batch.active for batch in batches], axis=0),
            shape=batches[0].shape,
        )


def strongest(activation: Tensor, rectify: bool = False) -> Strongest:
    """The strongest cell of every map; of equal cells the first in row-major order.

    Args:
        activation: [N, C, H, W], fastest if channels-last; or [N, C] of a fully connected layer (1x1 maps).
        rectify: take the ReLU of it first, in place, in the same pass where it is channels-last.

    Raises: NotFinite where an activation is NaN or infinite: it would sort nowhere.
    """
    maps = activation[:, :, None, None] if activation.dim() == 2 else activation
    cells = maps.permute(0, 2, 3, 1)  # maps innermost, as convolutions of an image leave them
    if rectify and not cells.is_contiguous():
        activation.relu_()  # it is a copy that is reduced
    found = Strongest(*reduce_cells(cells.contiguous(), rectify), shape=(cells.shape[1], cells.shape[2]))
    if not np.isfinite(found.total).all():
        broken = (~torch.isfinite(activation)).reshape(*maps.shape[:2], -1).any(-1).nonzero()
        if len(broken):
            raise NotFinite(*(int(v) for v in broken[0]))
    return found


def strongest_of_layers(graph: Graph, x: Tensor, layers: Collection[str]) -> dict[str, Strongest]:
    """The strongest cells of layers of a network, for images x [N, channels, rows, columns].

    Only what the layers need is run, and a layer's own ReLU is computed in the pass over its cells.

    Raises: UnknownLayer; NotFinite.
    """
    nodes = {layer: graph.activation_of(layer) for layer in layers}
    found: dict[str, Strongest] = {}

    def rectify_and_find(node: str, x: Tensor) -> Tensor:
        found[node] = strongest(x, rectify=True)
        return x

    own = [node for node in nodes.values() if _may_write_over_its_input(graph, node, nodes.values())]
    activations = graph.run(x, nodes.values(), {node: partial(rectify_and_find, node) for node in own})
    return {layer: found.get(node) or strongest(activations[node]) for layer, node in nodes.items()}


def _may_write_over_its_input(graph: Graph, node: str, wanted: Collection[str]) -> bool:
    """Whether it is a ReLU of what a convolution, linear layer or batch norm made for it alone."""
    if graph[node].kind != "relu":
        return False
    (source,) = graph[node].inputs
    made = graph[source].kind in ("conv", "linear", "batchnorm")
    return made and source not in wanted and graph.users[source] == (node,)


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
        """The state of some images. `samples` [N] are their numbers, each once."""
        value = np.ascontiguousarray(found.value.T)
        images = value.shape[1]
        threshold = np.partition(value, images - k, axis=1)[:, images - k] if images > k else np.float32(-np.inf)
        feature_map, image = _candidates(value, threshold)
        row, col = np.divmod(found.position[image, feature_map].astype(np.int64), found.shape[1])
        entries = _Entries(feature_map, value[feature_map, image], samples[image], row, col)
        return _best(entries, len(value), k)

    @classmethod
    def merge(cls, states: list[TopK]) -> TopK:
        """One state of several, in any order and with repetitions.

        Raises: ValueError for no state, or states of different k.
        """
        if len({state.k for state in states}) != 1:
            raise ValueError(f"given states of k = {[s.k for s in states]}: merge one or more states of one k")
        activation, sample, row, col = (
            np.concatenate([getattr(state, name) for state in states], axis=1)
            for name in ("activation", "sample", "row", "col")
        )
        # What is weaker than any state's last place has k better ones before it: few entries are left to be sorted.
        threshold = np.max([state.activation[:, -1] for state in states], axis=0)
        places = _candidates(activation, threshold)
        entries = _Entries(places[0], activation[places], sample[places], row[places], col[places])
        return _best(entries, len(activation), states[0].k)


class _Entries(NamedTuple):
    """Candidates of all maps, one after another."""

    feature_map: Ints
    activation: Floats
    sample: Ints
    row: Ints
    col: Ints

    def take(self, chosen: npt.NDArray[Any]) -> _Entries:
        return _Entries(*(column[chosen] for column in self))


def _candidates(activation: Floats, threshold: npt.NDArray[np.float32] | np.float32) -> tuple[Ints, Ints]:
    """Map and place of all entries that are alive and not weaker than the map's threshold."""
    feature_map, place = np.nonzero((activation > 0) & (activation >= np.reshape(threshold, (-1, 1))))
    return feature_map, place


def _best(entries: _Entries, maps: int, k: int) -> TopK:
    """The first k of each map in the total order, one for each sample."""
    entries = _first_of_each_sample(entries.take(_order(entries)))
    count = np.bincount(entries.feature_map, minlength=maps)
    place = np.arange(len(entries.feature_map)) - np.repeat(np.cumsum(count) - count, count)
    kept = entries.take(place < k)
    where = kept.feature_map, place[place < k]
    best = TopK(np.zeros((maps, k), np.float32), np.full((maps, k), NONE), *np.zeros((2, maps, k), np.int64))
    for name in ("activation", "sample", "row", "col"):
        getattr(best, name)[where] = getattr(kept, name)
    return best


def _order(entries: _Entries) -> Ints:
    """The total order of live entries: map, activation descending, sample, row, col."""
    # The bits of a positive float sort as it does: with its map it is one integer, and ties are seldom.
    strength = entries.feature_map << 32 | np.iinfo(np.int32).max - entries.activation.view(np.int32).astype(np.int64)
    order = np.argsort(strength)
    return np.lexsort((entries.col, entries.row, entries.sample, strength)) if _repeated(strength[order]) else order


def _first_of_each_sample(entries: _Entries) -> _Entries:
    """Of entries in the total order, the first of each sample in its map."""
    if not _repeated(np.sort(entries.feature_map << 40 | entries.sample)):
        return entries
    by_sample = np.lexsort((entries.sample, entries.feature_map))  # stable
    names = np.stack([entries.feature_map[by_sample], entries.sample[by_sample]])
    again = np.zeros(len(by_sample), dtype=bool)
    again[by_sample[1:]] = (names[:, 1:] == names[:, :-1]).all(0)
    return entries.take(~again)


def _repeated(ordered: Ints) -> bool:
    return bool((ordered[1:] == ordered[:-1]).any())


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
    bins: Ints
    """[M] the bins of the histograms that are not empty, as feature_map * BINS + bin, ascending."""
    counts: Ints
    """[M] images in each of them: those whose strongest cell has an activation of that bin."""

    @property
    def histogram(self) -> Ints:
        """[C, BINS] images by the activation of their strongest cell, where above zero."""
        dense = np.zeros(len(self.maximum) * BINS, dtype=np.int64)
        dense[self.bins] = self.counts
        return dense.reshape(-1, BINS)

    @classmethod
    def of(cls, found: Strongest) -> Statistics:
        """The statistics of some images."""
        alive = found.value > 0
        bin_ = np.arange(found.value.shape[1]) * BINS + bin_of(found.value)
        bins, counts = np.unique(bin_[alive], return_counts=True)
        return cls(
            images=len(found.value),
            cells=found.cells,
            total=found.total,
            maximum=found.value.max(0),
            active_images=alive.sum(0),
            active_cells=found.active,
            bins=bins,
            counts=counts,
        )

    @classmethod
    def merge(cls, parts: list[Statistics]) -> Statistics:
        """The statistics of several disjoint sets of images. Sums are added in the order given: fix that order."""
        total = parts[0].total.copy()
        for part in parts[1:]:
            total += part.total
        dense = np.zeros(len(total) * BINS, dtype=np.int64)
        for part in parts:
            dense[part.bins] += part.counts
        bins = np.flatnonzero(dense)
        return cls(
            images=sum(part.images for part in parts),
            cells=parts[0].cells,
            total=total,
            maximum=np.max([part.maximum for part in parts], axis=0),
            active_images=np.sum([part.active_images for part in parts], axis=0),
            active_cells=np.sum([part.active_cells for part in parts], axis=0),
            bins=bins,
            counts=dense[bins],
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
