"""Any torchvision data set of images and labels, by name; downloaded where the network allows."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.shards import BadShards

_SPLITS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("train", {"train": True}, {"train": False}),
    ("split", {"split": "train"}, {"split": "test"}),
    ("split", {"split": "train"}, {"split": "val"}),
    ("image_set", {"image_set": "train"}, {"image_set": "val"}),
)


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """A class of torchvision.datasets, for example CIFAR10. Its images are stored as PNG: nothing is lost."""

    name: str
    root: Path
    """Where torchvision keeps or downloads the data."""

    @cached_property
    def _datasets(self) -> dict[str, Any]:
        from torchvision import datasets

        kind = getattr(datasets, self.name, None)
        if not inspect.isclass(kind):
            raise BadShards(f"torchvision.datasets has no {self.name!r}: give a class of it, for example CIFAR10")
        open_: Callable[..., Any] = kind
        parameters = inspect.signature(kind).parameters
        download = {"download": True} if "download" in parameters else {}
        reasons = []
        for parameter, train, val in _SPLITS:
            if parameter in parameters:
                try:
                    made = [open_(self.root, **arguments, **download) for arguments in (train, val)]
                    return dict(zip(("train", "val"), made, strict=True))
                except Exception as error:  # torchvision raises RuntimeError, URLError, ValueError, ...
                    reasons.append(f"{parameter}: {error}")
        raise BadShards(
            f"torchvision's {self.name} cannot be opened in {self.root} ({'; '.join(reasons) or 'it has no splits'}): "
            "download it by hand into --root, or use jobs/shards.py imagefolder"
        )

    @cached_property
    def classes(self) -> list[str] | None:
        """Names of the classes, or their numbers."""
        found = getattr(self._datasets["train"], "classes", None)
        return [str(name) for name in found] if found else None

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return {name: len(dataset) for name, dataset in self._datasets.items()}

    def about(self) -> dict[str, Any]:
        """What decides the content."""
        return {"kind": "torchvision", "name": self.name, "splits": self.splits}

    def sample(self, split: str, number: int) -> dict[str, Any]:
        """The image as PNG, with its label."""
        image, label = self._datasets[split][number]
        if not isinstance(image, Image.Image) or not isinstance(label, int):
            raise BadShards(
                f"torchvision's {self.name} gives {type(image).__name__} and {type(label).__name__}: "
                "a data set of images with one class number each is needed"
            )
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        about = {"cls": label, "width": image.width, "height": image.height, "mode": image.mode}
        return {"__key__": f"{split}-{number:07d}", "png": buffer.getvalue(), "cls": label, "json": about}
