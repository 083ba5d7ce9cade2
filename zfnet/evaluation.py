"""How well a network classifies: averaged over views of an image and over networks; ranks, losses, errors.

AlexNet section 4.1: the softmax is averaged over ten crops of the image. ZFNet table 2 and AlexNet table 2: the softmax
of several networks is averaged too. Both averages are taken in float64 and of logarithms, so that no probability
underflows: neither ties at zero nor infinite losses come from the arithmetic. Equal probabilities are ordered by class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from zfnet import images
from zfnet.activations import NotFinite
from zfnet.graph import Graph
from zfnet.images import Pixels, Preprocessing

Views = Literal["centre", "ten"]
VIEWS: dict[Views, int] = {"centre": 1, "ten": 10}
"""How many they are."""

TOP = 5
"""Classes that are kept of each image."""


def crops(image: Image.Image, resize_px: int, crop_px: int, views: Views) -> tuple[Pixels, list[int], list[int]]:
    """The views of an image.

    Returns: uint8 [V, crop_px, crop_px, 3] RGB, and tops and lefts of the views in the centre square of resize_px.
    Raises: BadImage as `images.resize`.
    """
    if views == "ten":
        return images.ten_crops(image, resize_px, crop_px)
    pixels, _ = images.centre_crop(image, resize_px, crop_px)
    start = images.centre_offset(resize_px, crop_px)
    return pixels[None], [start], [start]


def log_softmax(graph: Graph, preprocessing: Preprocessing, views: Tensor, top: list[int], left: list[int]) -> Tensor:
    """Logarithm of a network's softmax for each view of each image. One view of all images is run at a time.

    Args:
        graph: ends in a score, or from a softmax a probability, for each of C classes.
        preprocessing: the network's.
        views: uint8 [N, V, crop_px, crop_px, 3], RGB.
        top, left: [V], where the views lie in the centre square.

    Returns: float64 [N, V, C].
    Raises: NotFinite for a class score that is NaN or infinite.
    """
    found = []
    for view, corner in enumerate(zip(top, left, strict=True)):
        x = preprocessing.normalise(views[:, view], *(torch.full((len(views),), offset) for offset in corner))
        scores = graph.run(x, [graph.output])[graph.output].double()
        for image, class_ in (~scores.isfinite()).nonzero().tolist():
            raise NotFinite(image, class_)
        ends_in_softmax = graph[graph.output].kind == "softmax"
        found.append(scores.log() if ends_in_softmax else scores.log_softmax(1))
    return torch.stack(found, 1)


def average(networks: list[Tensor]) -> Tensor:
    """Logarithm of the softmax's mean over views, then over networks.

    Args:
        networks: for each network [N, V, C] as from `log_softmax`, of the same images and classes.

    Returns: [N, C].
    """
    each = torch.stack([torch.logsumexp(found, 1) - math.log(found.shape[1]) for found in networks])
    return torch.logsumexp(each, 0) - math.log(len(networks))


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is said of N images."""

    classes: Tensor
    """int64 [N, K], the most probable first, equals by number; K = 5, or all classes where there are fewer."""
    probabilities: Tensor
    """float64 [N, K]."""
    label_rank: Tensor
    """int64 [N], place of the label in the order of all classes, from 1."""
    loss: Tensor
    """float64 [N], cross-entropy: minus the logarithm of the label's probability."""

    @classmethod
    def of(cls, log_probabilities: Tensor, labels: Tensor) -> Predictions:
        """From log_probabilities [N, C] and labels, int64 [N] below C."""
        ordered, order = log_probabilities.sort(dim=1, descending=True, stable=True)  # topk breaks ties at random
        place = (order == labels[:, None]).byte().argmax(1, keepdim=True)
        loss = -ordered.gather(1, place)[:, 0]
        return cls(order[:, :TOP], ordered[:, :TOP].exp(), place[:, 0] + 1, loss)


Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Errors:
    """Counts of each class, [C]."""

    images: Counts
    top1: Counts
    """Those whose label is not the most probable class."""
    top5: Counts
    """Those whose label is not among the five most probable ones."""

    @classmethod
    def of(cls, labels: Counts, label_ranks: Counts, classes: int) -> Errors:
        """From labels and their ranks, [N]."""
        wrong = [labels, labels[label_ranks > 1], labels[label_ranks > TOP]]
        return cls(*(np.bincount(some, minlength=classes) for some in wrong))

    @property
    def mean_class_accuracy(self) -> float:
        """Mean over the classes that have images of the share of theirs that is right (the custom of Caltech-101)."""
        seen = self.images > 0
        return float((1 - self.top1[seen] / self.images[seen]).mean())
