"""The per-pixel mean image and the colours' covariance of a training set (AlexNet sections 2 and 4.1), in one pass.

Sums are of integers, so they are exact, and the same bits for any number of workers and any order. They are made once
for a set of images and stored with its shards; where that folder is not ours to write, with the run.

shards/NAME/statistics/train-DATA_ID-256.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.runs import RunError
from pipeline.shards import Index, Skipped
from pipeline.storage import Location, StorageError
from pipeline.stream import processes
from zfnet import images

_BATCH = 64


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the centre squares of all training images that can be read."""

    mean: Tensor
    """float32 [3, resize_px, resize_px], RGB, 0 to 255."""
    covariance: Tensor
    """float64 [3, 3], of RGB over all pixels."""


@dataclass(eq=False)
class _Totals:
    """Exact sums over some images: int64 holds 10^14 pixels."""

    pixels: Tensor
    """[resize_px, resize_px, 3]."""
    products: Tensor
    """[3, 3] of pairs of channels, over all pixels."""
    count: Tensor
    """[1] images."""

    @classmethod
    def none(cls, resize_px: int) -> _Totals:
        """No image yet."""
        return cls(*(torch.zeros(*shape, dtype=torch.int64) for shape in ((resize_px, resize_px, 3), (3, 3), (1,))))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that is summed."""
        return self.pixels, self.products, self.count

    def add(self, other: _Totals) -> None:
        """Add other images' sums, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs


class _Sums(Dataset[_Totals]):
    """Totals over runs of rows."""

    def __init__(self, index: Index, rows: pa.Table, resize_px: int, starts: list[int]) -> None:
        self.index, self.rows, self.resize_px, self.starts = index, rows, resize_px, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, item: int) -> _Totals:
        totals = _Totals.none(self.resize_px)
        for sample in self.index.read(self.rows.slice(self.starts[item], _BATCH)):
            if isinstance(sample, Skipped):
                continue
            try:
                square, _ = images.centre_crop(images.decode(sample.image), self.resize_px, self.resize_px)
            except images.BadImage:
                continue  # training reports it
            totals.pixels += torch.from_numpy(square.astype(np.int64))
            # float64 products are exact below 2^53: an image would need 10^11 pixels to leave that.
            flat = square.reshape(-1, 3).astype(np.float64)
            totals.products += torch.from_numpy((flat.T @ flat).astype(np.int64))
            totals.count += 1
        return totals


def measure(index: Index, rows: pa.Table, resize_px: int, *, rank: int, world: int, decoders: int) -> Statistics:
    """Statistics of the images of `rows`, each rank reading its share; the same bits on every rank, for any world."""
    starts = list(range(0, rows.num_rows, _BATCH))[rank::world]
    totals = _Totals.none(resize_px)
    dataset = _Sums(index, rows, resize_px, starts)
    started = processes(index) if decoders else None
    loader = DataLoader(dataset, batch_size=None, num_workers=decoders, multiprocessing_context=started)
    for part in loader if starts else ():
        totals.add(part)
    pixels, products, count = totals.tensors()
    if world > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        pixels, products, count = (tensor.to(device) for tensor in totals.tensors())
        for tensor in (pixels, products, count):
            dist.all_reduce(tensor)
    images_ = max(int(count), 1)
    mean = pixels.cpu().to(torch.float64) / images_
    number = images_ * resize_px**2
    channels = pixels.cpu().sum((0, 1)).to(torch.float64) / number
    covariance = products.cpu().to(torch.float64) / number - torch.outer(channels, channels)
    return Statistics(mean.permute(2, 0, 1).to(torch.float32).contiguous(), covariance)


def statistics(
    index: Index, split: str, rows: pa.Table, resize_px: int, *, run: Location, rank: int, world: int, decoders: int
) -> Statistics:
    """Statistics of a split: those stored with the data set or the run, or else measured and stored.

    Args:
        index: the shards.
        split: name of the split that `rows` are the labelled samples of.
        rows: samples to measure.
        resize_px: side of the centre square.
        run: folder of the run, used where the shards' folder cannot be written.
        rank, world: of this worker; rank 0 reads and writes the file.
        decoders: processes that decode.

    Raises: RunError where the stored file is damaged.
    """
    name = f"{split}-{index.data_id(split)}-{resize_px}.safetensors"
    places = [index.folder / "statistics" / name, run / "checkpoints" / name]
    found = [_stored(places) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(found)
    if found[0] is not None:
        return found[0]
    measured = measure(index, rows, resize_px, rank=rank, world=world, decoders=decoders)
    if rank == 0:
        _store(measured, places)
    return measured


def _stored(places: list[Location]) -> Statistics | None:
    for place in places:
        try:
            tensors = load(place.read())
            return Statistics(tensors["mean"], tensors["covariance"])
        except FileNotFoundError:
            continue
        except (SafetensorError, KeyError) as error:
            raise RunError(f"{place} is damaged ({error}): delete it, and it is measured again") from None
    return None


def _store(measured: Statistics, places: list[Location]) -> None:
    data = save({"mean": measured.mean, "covariance": measured.covariance})
    try:
        places[0].write(data)
    except StorageError:  # the shards are somebody else's
        places[1].write(data)
