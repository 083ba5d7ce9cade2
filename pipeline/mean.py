"""The per-pixel mean image of a training set (AlexNet section 2, ZFNet section 3), exact for any number of workers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.shards import Index, Skipped
from zfnet import images

_BATCH = 64


class _Sums(Dataset[tuple[Tensor, int]]):
    """Sums over runs of rows: integers, so their order does not matter."""

    def __init__(self, index: Index, rows: pa.Table, resize_px: int, starts: list[int]) -> None:
        self.index, self.rows, self.resize_px, self.starts = index, rows, resize_px, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        total = np.zeros((self.resize_px, self.resize_px, 3), dtype=np.int64)
        count = 0
        for sample in self.index.read(self.rows.slice(self.starts[item], _BATCH)):
            if isinstance(sample, Skipped):
                continue
            try:
                image = images.decode(sample.image)
                square, _ = images.centre_crop(image, self.resize_px, self.resize_px)
            except images.BadImage:
                continue  # training reports it
            total += square
            count += 1
        return torch.from_numpy(total), count


def mean_image(index: Index, rows: pa.Table, resize_px: int, *, rank: int, world: int, decoders: int) -> Tensor:
    """The mean of the centre squares of all images that can be read.

    Returns: float32 [3, resize_px, resize_px], RGB, 0 to 255; the same bits on every rank and for any `world`.
    """
    starts = list(range(0, rows.num_rows, _BATCH))[rank::world]
    total = torch.zeros(resize_px, resize_px, 3, dtype=torch.int64)
    count = torch.zeros(1, dtype=torch.int64)
    dataset = _Sums(index, rows, resize_px, starts)
    for part, number in DataLoader(dataset, batch_size=None, num_workers=decoders) if starts else ():
        total += part
        count += number
    if world > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        total, count = total.to(device), count.to(device)
        dist.all_reduce(total)
        dist.all_reduce(count)
    mean = total.cpu().to(torch.float64) / max(int(count), 1)
    return mean.permute(2, 0, 1).to(torch.float32).contiguous()
