"""What hides a part of an image, as --fill says it: a grey, a colour, the mean, or the image blurred."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.runs import Run, RunError
from zfnet.images import Pixels, Preprocessing
from zfnet.occlusion import blurred

BLUR_SHARE = 10 / 224
"""Sigma of the blur, as a share of the image's side."""


def colour(text: str, others: str = "mean or blur") -> tuple[int, ...]:
    """Red, green and blue, 0 to 255, of an option --fill that takes `others` as well. Raises: RunError."""
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() and int(part) <= 255 for part in parts):
        raise RunError(f"--fill is {text}: give a grey from 0 to 255, a colour as R,G,B, {others}")
    return tuple(int(part) for part in parts) * (3 // len(parts))


def require_fill(fill: str) -> None:
    """What --fill may be. Raises: RunError."""
    if fill not in ("mean", "blur"):
        colour(fill)


def shown(fill: str, pixels: Tensor) -> Tensor:
    """[rows, cols, RGB], 0 to 255: what hides `pixels` [rows, cols, RGB], whatever the network; not for "mean"."""
    if fill == "blur":
        return blurred(pixels, BLUR_SHARE * len(pixels))
    return torch.tensor(colour(fill), device=pixels.device).expand_as(pixels)


def as_input(fill: str, pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """[3, rows, cols]: what hides `pixels`, as the network takes it."""
    if fill == "mean":
        return torch.zeros(3, *pixels.shape[:2], device=pixels.device)  # the mean is what is subtracted
    return preprocessing.normalise(shown(fill, pixels)[None])[0]


class Hider:
    """Draws images with a part hidden as a run's network saw it, by what its tables call `fill`.

    The network's mean, which hides where that is "mean", is read once, and only then.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def _mean(self) -> Tensor:
        return self.run.load_model().preprocessing.mean_pixels()

    def hidden(self, pixels: Pixels, fill: str, place: tuple[int, int, int, int]) -> Pixels:
        """The image with the part hidden.

        Args:
            pixels: the network's own [input_px, input_px, RGB].
            fill: a grey, R,G,B, mean or blur.
            place: top, left, height, width in input pixels; it may leave the image.
        """
        filled = self._mean if fill == "mean" else shown(fill, torch.from_numpy(pixels.copy()))
        top, left, height, width = place
        part = slice(max(top, 0), top + height), slice(max(left, 0), left + width)
        drawn = pixels.copy()
        drawn[part] = np.rint(filled.numpy()[part]).clip(0, 255)
        return drawn
