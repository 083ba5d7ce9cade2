"""How far one gets without learning features: what a trained network's accuracy has to be held against."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.shards import Index
from pipeline.stream import Images, labelled
from zfnet import models, recipe
from zfnet.images import Preprocessing
from zfnet.tracing import trace

Features = npt.NDArray[np.float32]
_BATCH = 256
_PIXELS = 32
_STRENGTHS = (1e-4, 1e-3, 1e-2)
"""Inverse strengths of regularisation that are tried; the best on the validation images counts: no fairer than that."""


def linear_baselines(index: Index, architecture: str, most: int = 4000) -> dict[str, float]:
    """Validation accuracy of logistic regression on pixels and on an untrained network's features.

    Args:
        index: labelled shards with the splits train and val.
        architecture: the network whose features are taken, with He's random weights.
        most: at most this many training images are used.

    Returns: name of the features -> share of the validation images classified rightly.
    """
    network = models.build(architecture, classes=len(index.classes)).eval()
    recipe.initialise(network, "he")
    graph = trace(network, (3, network.input_px, network.input_px))
    last = graph.activation_of(graph.last_convolution)
    preprocessing = Preprocessing(resize_px=network.resize_px, crop_px=network.input_px)
    pixels = {split: _pixels(index, split, preprocessing, most) for split in ("train", "val")}

    def small(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, _PIXELS, mode="area").flatten(1)

    def pooled(x: torch.Tensor) -> torch.Tensor:
        maps = graph.run(x - 128, [last])[last]
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    kinds = {f"{_PIXELS} px pixels": small, f"untrained {architecture}, {graph.last_convolution}": pooled}
    return {name: _accuracy(pixels, features) for name, features in kinds.items()}


def _pixels(
    index: Index, split: str, preprocessing: Preprocessing, most: int
) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    rows, _ = labelled(index, split, len(index.classes))
    rows = rows.slice(0, most) if split == "train" else rows
    examples = Images(index, rows, preprocessing, 0).__getitems__([(0, row) for row in range(rows.num_rows)])
    return preprocessing.normalise(examples.pixels), examples.label.numpy()


@torch.inference_mode()
def _accuracy(
    pixels: dict[str, tuple[torch.Tensor, npt.NDArray[np.int64]]], features: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    found = {
        split: torch.cat([features(batch) for batch in x.split(_BATCH)]).numpy() for split, (x, _) in pixels.items()
    }
    scaler = StandardScaler().fit(found["train"])
    x, y = scaler.transform(found["train"]), pixels["train"][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [LogisticRegression(C=strength, max_iter=100).fit(x, y) for strength in _STRENGTHS]
    return max(float(fit.score(scaler.transform(found["val"]), pixels["val"][1])) for fit in fits)
