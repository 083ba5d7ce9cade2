"""Networks by name: the papers', torchvision's, and those of any function.

`build("zfnet")` is the paper's; `names()` lists the papers' networks with their variants.
`build("torchvision:resnet18")` is any classifier of torchvision, `build("package.module:function")` what a function
returns.
"""

from __future__ import annotations

import difflib
from typing import cast

from torch import nn

from zfnet.images import Preprocessing
from zfnet.models.alexnet import ALEXNET, ALEXNET_SMALL, ALEXNET_UNGROUPED
from zfnet.models.foreign import (
    PAPERS_CROP_PX,
    PAPERS_RESIZE_PX,
    TORCHVISION,
    build_foreign,
    torchvision_classes,
    torchvision_preprocessing,
    torchvision_tensors,
    torchvision_weights,
)
from zfnet.models.heads import HeadedNetwork
from zfnet.models.layers import Architecture, Network
from zfnet.models.overfeat import NETWORKS as OVERFEAT
from zfnet.models.variants import CLAIMS, variants
from zfnet.models.weights import classes_of, load_tensors
from zfnet.models.zfnet import ZFNET, ZFNET_SMALL

__all__ = [
    "CLASSES",
    "Classifier",
    "Network",
    "build",
    "classes_of",
    "load_tensors",
    "names",
    "preprocessing_of",
    "torchvision_classes",
    "torchvision_tensors",
    "torchvision_weights",
]

CLASSES = 1000
"""ImageNet's."""

_VARIED = (ZFNET, ZFNET_SMALL, ALEXNET, ALEXNET_SMALL)
_VARIANTS = [row for base in _VARIED for row in variants(base)]
_VARIANTS += [row for base in (ALEXNET, ALEXNET_SMALL) for row in variants(base, CLAIMS)]
_ARCHITECTURES: dict[str, Architecture] = {
    table.name: table for table in (*_VARIED, ALEXNET_UNGROUPED, *OVERFEAT, *_VARIANTS)
}


class Classifier(nn.Module):
    """What `build` returns, to the type checker: a module that knows the size of its input."""

    input_px: int
    """Side of the square crop that the network sees, in pixels."""
    resize_px: int
    """What an image's smallest side is resized to before it is cropped, in pixels."""


def names() -> tuple[str, ...]:
    """The papers' networks and their variants. `build` takes torchvision's networks and functions besides."""
    return tuple(_ARCHITECTURES)


def build(name: str, classes: int = CLASSES) -> Classifier:
    """Build the network of that name, with torch's weights; `zfnet.recipe.initialise` gives it the paper's.

    Args:
        name: one of `names()`, "torchvision:NAME", "package.module:function", or a part of the latter two, as
            "torchvision:alexnet.features"; or an OverFeat network with heads, as "overfeat_fast+boxes"
            (`zfnet.models.heads`). A function's parameter `classes` or `num_classes`, where it has one, gets
            the number of classes.
        classes: outputs of the last layer; ImageNet has 1000.

    Returns: the module, with `input_px` and `resize_px`; a function's module that has none is taken to see 224 of 256.

    Raises:
        ValueError: no network has that name; the message suggests the nearest. Or fewer than one class.
    """
    if classes < 1:
        raise ValueError(f"classes is {classes}: a classifier has at least 1; give the number of your labels")
    if ":" not in name:
        base, *heads = name.split("+")
        table = _architecture(base)
        return cast(Classifier, HeadedNetwork(table, classes, tuple(heads)) if heads else Network(table, classes))
    network = cast(Classifier, build_foreign(name, classes))
    if not hasattr(network, "input_px"):
        network.input_px = preprocessing_of(name).crop_px
    if not hasattr(network, "resize_px"):
        network.resize_px = max(preprocessing_of(name).resize_px, network.input_px)
    return network


def preprocessing_of(name: str, weights: str = "DEFAULT") -> Preprocessing:
    """How images are prepared for the network of that name, as far as the name says it.

    For torchvision's networks as torchvision does for the trained weights of that name; for all others RGB from 0 to
    255 with no mean subtracted.

    Raises:
        ValueError: no network has that name.
    """
    if name.startswith(TORCHVISION):
        return torchvision_preprocessing(name, weights)
    if ":" in name:
        return Preprocessing(resize_px=PAPERS_RESIZE_PX, crop_px=PAPERS_CROP_PX)
    architecture = _architecture(name.split("+")[0])
    return Preprocessing(resize_px=architecture.resize_px, crop_px=architecture.input_px)


def _architecture(name: str) -> Architecture:
    if name not in _ARCHITECTURES:
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0)[0]
        raise ValueError(
            f"no network is called {name!r}. Did you mean {near!r}? Expected one of {', '.join(names())}, "
            "torchvision:NAME or package.module:function"
        )
    return _ARCHITECTURES[name]
