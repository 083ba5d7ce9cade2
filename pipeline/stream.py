"""The training stream: which image comes when, and its decoding in worker processes.

The order of an epoch is a function of (seed, epoch) and the index alone: parts of consecutive samples are shuffled
and dealt to logical readers, each shuffles within a window of its parts, and a global batch takes from the readers
in turn. Rank r of W takes every W-th image of each global batch, so a batch is the same set for every W, and a
resume is exact at any W. Augmentation is drawn from (seed, epoch, key).
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.shards import Index, Sample, Skipped, with_label
from zfnet import images
from zfnet.images import Preprocessing

READERS = 16
PART_SIZE = 64
WINDOW_PARTS = 8

Place = tuple[int, int]
"""Epoch and row of the sample; epoch 0 stands for the undistorted centre crop."""


def epoch_order(shards: npt.NDArray[np.generic], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch takes the samples.

    Args:
        shards: [N] the shard of each sample, in index order.

    Returns: [N] rows, each once.
    """
    rng = np.random.default_rng([seed, epoch])
    borders = np.flatnonzero(shards[1:] != shards[:-1]) + 1
    parts = [
        run[start : start + PART_SIZE]
        for run in np.split(np.arange(len(shards)), borders)
        for start in range(0, len(run), PART_SIZE)
    ]
    shuffled = [parts[i] for i in rng.permutation(len(parts))]
    rows, turns, readers = [], [], []
    for reader in range(READERS):
        mine = shuffled[reader::READERS]
        windows = [np.concatenate(mine[i : i + WINDOW_PARTS]) for i in range(0, len(mine), WINDOW_PARTS)]
        if not windows:
            continue
        stream = np.concatenate([rng.permutation(window) for window in windows])
        rows.append(stream)
        turns.append(np.arange(len(stream)))
        readers.append(np.full(len(stream), reader))
    in_turn = np.lexsort((np.concatenate(readers), np.concatenate(turns)))
    order: npt.NDArray[np.int64] = np.concatenate(rows)[in_turn]
    return order


def rank_batches(
    shards: npt.NDArray[np.generic], *, seed: int, first_step: int, epochs: int, batch: int, rank: int, world: int
) -> Iterator[list[Place]]:
    """The batches of one rank from the step numbered `first_step` (from 0, over all epochs): its share of each.

    The samples that do not fill an epoch's last batch are left out of that epoch; they differ from epoch to epoch.
    """
    steps = len(shards) // batch
    for epoch in range(first_step // steps + 1, epochs + 1):
        order = epoch_order(shards, seed, epoch)
        for step in range(max(first_step - (epoch - 1) * steps, 0), steps):
            share = order[step * batch : (step + 1) * batch][rank::world]
            yield [(epoch, int(row)) for row in share]


_Taken = tuple[images.Pixels, int, int, int, npt.NDArray[np.float64] | None]
"""Pixels of the crop, its top and left, the label, and the shift of the colours."""


def generator(seed: int, epoch: int, key: str) -> np.random.Generator:
    """What decides how a sample is cut, mirrored and coloured: nothing but the seed, the epoch and its key."""
    digest = hashlib.blake2b(f"{seed} {epoch} {key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


@dataclass(frozen=True, eq=False)
class Examples:
    """A batch as it leaves the decoders."""

    pixels: Tensor
    """uint8 [N, crop_px, crop_px, 3], RGB."""
    top: Tensor
    """[N] of the crop in the square of resize_px."""
    left: Tensor
    label: Tensor
    """int64 [N]."""
    colour: Tensor | None
    """float32 [N, 3], RGB: what is added to every pixel of an image; None: nothing."""
    skipped: list[Skipped]


class Images(Dataset[Any]):
    """Labelled samples by place, decoded and cropped."""

    def __init__(
        self,
        index: Index,
        rows: pa.Table,
        preprocessing: Preprocessing,
        seed: int,
        smallest: float | None = None,
        colours: npt.NDArray[np.float64] | None = None,
    ) -> None:
        self.index, self.rows, self.seed, self.smallest, self.colours = index, rows, seed, smallest, colours
        self.resize_px, self.crop_px = preprocessing.resize_px, preprocessing.crop_px

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def __getitems__(self, places: list[Place]) -> Examples:
        """A batch; what cannot be read is in its `skipped`."""
        found = self.index.read(self.rows.take(pa.array([row for _, row in places], type=pa.int64())))
        taken: list[_Taken] = []
        skipped: list[Skipped] = []
        for (epoch, _), sample in zip(places, found, strict=True):
            if isinstance(sample, Skipped):
                skipped.append(sample)
                continue
            try:
                taken.append(self._crop(sample, epoch))
            except images.BadImage as error:
                skipped.append(Skipped(sample.shard, sample.key, error.reason, error.detail))
        return self._collate(taken, skipped)

    def _crop(self, sample: Sample, epoch: int) -> _Taken:
        image = images.decode(sample.image)
        label = sample.label
        assert label is not None  # rows are chosen by `labelled`
        if epoch == 0:
            pixels, _ = images.centre_crop(image, self.resize_px, self.crop_px)
            start = images.centre_offset(self.resize_px, self.crop_px)
            return pixels, start, start, label, None
        rng = generator(self.seed, epoch, sample.key)
        pixels, top, left = images.random_crop(image, self.resize_px, self.crop_px, rng, self.smallest)
        colour = None if self.colours is None else rng.standard_normal(3) @ self.colours
        return pixels, top, left, label, colour

    def _collate(self, taken: list[_Taken], skipped: list[Skipped]) -> Examples:
        side = self.crop_px
        pixels = np.stack([item[0] for item in taken]) if taken else np.empty((0, side, side, 3), dtype=np.uint8)
        top, left, label = (torch.tensor([item[i] for item in taken], dtype=torch.int64) for i in (1, 2, 3))
        colours = [item[4] for item in taken if item[4] is not None]
        colour = torch.from_numpy(np.stack(colours).astype(np.float32)) if colours else None
        return Examples(torch.from_numpy(pixels), top, left, label, colour, skipped)


def labelled(index: Index, split: str, classes: int) -> tuple[pa.Table, list[Skipped]]:
    """The samples of a split that training can use, and the others with the reason."""
    return with_label(index.split(split), classes)


def loader(images_: Any, batches: Any, decoders: int) -> DataLoader[Any]:
    """A loader over batches of places, decoding ahead in `decoders` processes (0: in this one).

    Args:
        images_: a data set that takes lists of places, with the `index` of its shards.
        batches: of places.
        decoders: processes.
    """
    return DataLoader(
        images_,
        batch_sampler=batches,
        num_workers=decoders,
        collate_fn=_as_is,
        persistent_workers=decoders > 0,
        prefetch_factor=4 if decoders else None,
        multiprocessing_context=processes(images_.index) if decoders else None,
    )


def processes(index: Index) -> Any:
    """How processes that read these shards are started: an object store's client hangs in a forked process."""
    if index.folder.local is not None:
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.stream"])  # torch is imported once, not by each
    return context


def _as_is(examples: Any) -> Any:
    return examples
