"""What a network is shown of an image: crops, or all of it at several scales; and its probabilities of each view."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from pipeline.context import Context, read
from pipeline.runs import Model, RunError
from pipeline.shards import Sample, Skipped
from zfnet import dense, evaluation, images
from zfnet.dense import SCALES, MaximumOf, Sliding, Stride
from zfnet.evaluation import Views
from zfnet.graph import Graph
from zfnet.images import Crop, Pixels


class Viewer(Protocol):
    """A network and how it looks at images. `look` may run in other threads than `log_probabilities`."""

    @property
    def model(self) -> Model:
        """The network."""

    @property
    def sides(self) -> set[int]:
        """What the smallest side of an image is resized to: all that `look` needs."""

    @property
    def geometry(self) -> tuple[Any, ...]:
        """Viewers that have it in common see the same pixels."""

    def look(self, resized: dict[int, Image.Image], original: tuple[int, int]) -> Any:
        """The pixels of an image, given at each of `sides`, and its width and height before."""

    def stack(self, looks: Sequence[Any], device: str) -> Any:
        """What was seen of N images, on the device."""

    def log_probabilities(self, stacked: Any) -> Tensor:
        """float64 [N, views, classes]."""


@dataclass(frozen=True, eq=False)
class Crops:
    """The centre crop, or ten crops, of the size that the network is made for."""

    model: Model
    graph: Graph
    views: Views

    @property
    def sides(self) -> set[int]:
        """One."""
        return {self.model.preprocessing.resize_px}

    @property
    def geometry(self) -> tuple[Any, ...]:
        """resize_px and crop_px."""
        return self.model.preprocessing.resize_px, self.model.preprocessing.crop_px

    def look(self, resized: dict[int, Image.Image], original: tuple[int, int]) -> tuple[Pixels, list[int], list[int]]:
        """The crops, their tops and lefts."""
        resize_px, crop_px = self.geometry
        return evaluation.crops(resized[resize_px], resize_px, crop_px, self.views)

    def stack(self, looks: Sequence[Any], device: str) -> tuple[Tensor, list[int], list[int]]:
        """uint8 [N, V, crop_px, crop_px, 3], and tops and lefts, which are the same for all images."""
        _, top, left = looks[0]
        return torch.from_numpy(np.stack([pixels for pixels, _, _ in looks])).to(device), top, left

    def log_probabilities(self, stacked: tuple[Tensor, list[int], list[int]]) -> Tensor:
        """One view at a time."""
        return evaluation.log_softmax(self.graph, self.model.preprocessing, *stacked)


Group = tuple[list[int], Tensor]
"""Places of images of one size in a batch, and the images: uint8 [n, rows, cols, 3] or normalised."""


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of the image at several scales, and of its reflection (OverFeat 3.3)."""

    model: Model
    sliding: Sliding
    scales: tuple[int, ...]
    stride: Stride
    maximum_of: MaximumOf

    @property
    def sides(self) -> set[int]:
        """One for each scale."""
        return {self.sliding.sides_px(scale)[0] for scale in self.scales}

    @property
    def geometry(self) -> tuple[Any, ...]:
        """What decides the sizes of all scales."""
        return "windows", self.sliding.sides_px(1), self.sliding.step_px["coarse"]

    def look(self, resized: dict[int, Image.Image], original: tuple[int, int]) -> list[tuple[Pixels, Crop]]:
        """The image at each scale, and where its pixels lie in the original."""
        return look(self.sliding, self.scales, resized, original)

    def stack(self, looks: Sequence[Any], device: str) -> list[list[Group]]:
        """For each scale, the images of one size together."""
        return [list(groups([pixels for pixels, _ in of_scale], device)) for of_scale in zip(*looks, strict=True)]

    def log_probabilities(self, stacked: list[list[Group]]) -> Tensor:
        """Each scale and its reflection are two views."""
        preprocessing = self.model.preprocessing.of_any_size()
        of_scales = []
        for some in stacked:
            found = [
                dense.log_probabilities(self.sliding, preprocessing.normalise(pixels), self.stride, self.maximum_of)
                for _, pixels in some
            ]
            order = torch.tensor([place for places, _ in some for place in places]).argsort()
            of_scales.append(torch.cat(found)[order.to(found[0].device)])
        return torch.cat(of_scales, 1)


def look(
    sliding: Sliding, scales: Sequence[int], resized: dict[int, Image.Image], original: tuple[int, int]
) -> list[tuple[Pixels, Crop]]:
    """The image at each scale, and where its pixels lie in the original."""
    return [sliding.view(resized[sliding.sides_px(scale)[0]], original, scale) for scale in scales]


def groups(pixels: Sequence[Pixels], device: str) -> Iterator[Group]:
    """The images of one size together; sizes in the order in which they come."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, of_image in enumerate(pixels):
        places.setdefault(of_image.shape, []).append(place)
    for some in places.values():
        yield some, torch.from_numpy(np.stack([pixels[place] for place in some])).to(device)


@dataclass(frozen=True, eq=False)
class Seen:
    """A decoded sample at some scales."""

    sample: Sample
    number: int
    """Place of the key in key order, over the whole split."""
    views: list[tuple[Pixels, Crop]]
    """For each scale the pixels, and where they lie in the original."""


@dataclass(frozen=True, eq=False)
class Scaled:
    """Samples that go through the network together, at some scales."""

    pictures: list[Seen]
    at_scale: list[list[Group]]
    """For each scale the images of one size together, normalised: float32 [n, 3, rows, cols]."""


def at_scales(context: Context, scales: Sequence[int], rows: pa.Table) -> tuple[list[Seen], list[Skipped]]:
    """The images at some scales, for the run's network."""
    sliding = sliding_of(context.model, context.run.location)
    sides = {sliding.sides_px(scale)[0] for scale in scales}

    def see(sample: Sample, number: int) -> Seen:
        resized, original = images.decode_resized(sample.image, sides, scaled=context.decode == "scaled")
        return Seen(sample, number, look(sliding, scales, resized, original))

    return read(context, rows, see)


def scaled(context: Context, state: Any, pictures: list[Seen]) -> Scaled:
    """What the run's network sees of them."""
    preprocessing = context.model.preprocessing.of_any_size()
    of_scales = zip(*(picture.views for picture in pictures), strict=True)
    stacked = [list(groups([pixels for pixels, _ in views], context.device)) for views in of_scales]
    at_scale = [[(places, preprocessing.normalise(pixels)) for places, pixels in some] for some in stacked]
    return Scaled(pictures, at_scale)


def sliding_of(model: Model, path: object) -> Sliding:
    """The network, to be slid. Raises: RunError naming the run for one that cannot be."""
    try:
        return Sliding(model.network)
    except ValueError as error:
        raise RunError(f"{path}: {error}") from None


def checked_scales(scales: Collection[int]) -> tuple[int, ...]:
    """The scales in order, all where none is given. Raises: RunError for one that there is not, or given twice."""
    if unknown := [scale for scale in scales if not 1 <= scale <= len(SCALES)]:
        raise RunError(f"--scales has {unknown[0]}: give some of 1 to {len(SCALES)}")
    if len(set(scales)) < len(scales):
        raise RunError(f"--scales is {' '.join(map(str, scales))}: give each scale once")
    return tuple(sorted(scales)) or tuple(range(1, len(SCALES) + 1))
