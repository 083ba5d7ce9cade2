"""Scenes of the embedded data set's objects: one or several of an image, at any place and of many sizes, with boxes.

The same shapes, textures and backgrounds as the set `rendered`, where the object fills the middle of its image: there a
box about the centre is nearly right. Here it is not, so that localisation and detection have something to find.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.sources.rendered import (
    CLASSES,
    REACH,
    background_of,
    box_xyxy_px,
    finished,
    jpeg,
    mask_of,
    paint,
    png,
)

_PLACES = 100  # sizes and places that are tried for an object before it is left out


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Images of textured shapes that do not touch. A sample depends on (seed, split, number) alone."""

    seed: int = 0
    """Another seed draws other images of the same classes."""
    train: int = 4000
    """Images to train on."""
    val: int = 500
    """Images to validate on."""
    objects: tuple[int, int] = (1, 4)
    """Fewest and most objects of an image; fewer lie there where the last ones found no room."""
    radius: tuple[float, float] = (0.1, 0.25)
    """Smallest and largest object: radius of the disc of its area, as a part of the image's smallest side. Where
    there is little room the smaller ones find it."""

    def __post_init__(self) -> None:
        for name in ("seed", "train", "val"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects is {self.objects}; expected the fewest, from 1 on, and the most")
        if not 0.05 <= self.radius[0] <= self.radius[1] <= 0.5 / REACH:
            raise ValueError(
                f"radius is {self.radius}; expected two parts of the image's side, from 0.05 to {0.5 / REACH:.2f}"
            )

    @property
    def classes(self) -> list[str]:
        """Names of the classes, "shape texture", as in the set `rendered`."""
        return list(CLASSES)

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return {"train": self.train, "val": self.val}

    def about(self) -> dict[str, Any]:
        """What decides the content of every image."""
        found = {"name": "scenes", "version": 1, **dataclasses.asdict(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def sample(self, split: str, number: int) -> dict[str, Any]:
        """Draw one image.

        Returns:
            `__key__`; `jpg`; `cls`, the class of its first object, equally often each; `mask.png`, 255 on objects;
            `json`, a dict with label, cls, width, height, mode, boxes (one an object: label, and xyxy in pixels, the
            first column and row and the ones after the last), objects (how each was drawn), background.

        Raises:
            ValueError: there is no such split.
            IndexError: the split has fewer images.
        """
        if split not in self.splits:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(self.splits)}")
        if not 0 <= number < self.splits[split]:
            raise IndexError(f"number is {number}; {split!r} has {self.splits[split]} images, counted from 0")
        rng = np.random.default_rng([self.seed, list(self.splits).index(split), number, 0x5CE4E])
        picture, background = background_of(rng)
        height, width = picture.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        boxes, objects = [], []
        for place, (radius_px, centre_xy) in enumerate(self._places(rng, height, width)):
            label = CLASSES[int(rng.integers(len(CLASSES))) if place else number % len(CLASSES)]
            shape, texture = label.split()
            coverage, cause = paint(rng, picture, shape, texture, radius_px, centre_xy)
            covered = mask_of(coverage)
            mask |= covered
            boxes.append({"label": label, "xyxy": box_xyxy_px(covered)})
            objects.append({"shape": shape, "texture": texture, **cause})
        return {
            "__key__": f"{split}-{number:06d}",
            "jpg": jpeg(rng, finished(rng, picture)),
            "cls": number % len(CLASSES),
            "json": {
                "label": boxes[0]["label"],
                "cls": number % len(CLASSES),
                "width": width,
                "height": height,
                "mode": "RGB",
                "boxes": boxes,
                "objects": objects,
                "background": background,
            },
            "mask.png": png(mask),
        }

    def _places(self, rng: np.random.Generator, height: int, width: int) -> list[tuple[float, tuple[float, float]]]:
        """Radius and centre (x, y) in pixels of each object: all of it in the image, and none in another's reach."""
        side = min(height, width)
        found: list[tuple[float, tuple[float, float]]] = []
        for _ in range(int(rng.integers(*self.objects, endpoint=True))):
            for _ in range(_PLACES):
                radius_px = float(rng.uniform(*self.radius) * side)
                reach = REACH * radius_px
                x, y = (float(rng.uniform(reach, max(reach, length - reach))) for length in (width, height))
                if all(np.hypot(x - at[0], y - at[1]) >= reach + REACH * other for other, at in found):
                    found.append((radius_px, (x, y)))
                    break
        return found
