"""Networks from elsewhere: torchvision's classifiers by name, and any function that returns a module.

    torchvision:resnet18            a classifier of torchvision.models
    torchvision:alexnet.features    a part of it, under the names that its tensors have in the whole
    package.module:function         what the function returns; a parameter `classes` or `num_classes` gets the number

torchvision's GoogLeNet and Inception are built without their auxiliary classifiers, and always with transform_input
off: their trained weights expect pixels scaled to -1..1, which is said by their preprocessing instead.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zfnet.images import Preprocessing

TORCHVISION = "torchvision:"
PAPERS_CROP_PX, PAPERS_RESIZE_PX = 224, 256

# Trained in TensorFlow. torchvision's transform_input turns ImageNet's mean and deviation into these.
_SCALED_TO_ONE = ("googlenet", "inception_v3")


def build_foreign(name: str, classes: int) -> nn.Module:
    """Build a network of one of the forms above, with the weights that its own code gives it.

    Raises:
        ValueError: there is no such network, or it is not one; the message says which of the parts of the name failed.
    """
    origin, _, path = name.partition(":")
    function, *part = path.split(".")
    if origin == "torchvision":
        network = _torchvision_network(function, classes)
    else:
        network = _from_function(name, origin, function, classes)
    return _part(network, part, name) if part else network


def _torchvision_network(name: str, classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0)
        raise ValueError(
            f"torchvision has no classifier {name!r}; near to it are {', '.join(TORCHVISION + n for n in near)}"
        )
    headless: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name in _SCALED_TO_ONE else {}
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **headless)
    return network


def _from_function(name: str, module: str, function: str, classes: int) -> nn.Module:
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        signature = inspect.signature(found)
        given = {word: classes for word in ("classes", "num_classes") if word in signature.parameters}
        signature.bind(**given)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name!r} cannot be built: {error}. Expected package.module:function, a function that needs no argument "
            "but the number of classes, importable by every worker: install its package, or put it on PYTHONPATH"
        ) from None
    network = found(**given)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name!r} returned a {type(network).__name__}; expected a torch.nn.Module")
    return network


def _part(network: nn.Module, path: list[str], name: str) -> nn.Module:
    """A submodule, wrapped so that its layers and tensors keep their names."""
    try:
        part = network.get_submodule(".".join(path))
    except AttributeError:
        children = ", ".join(child for child, _ in network.named_children())
        raise ValueError(f"{name!r}: the network has no part {'.'.join(path)!r}; its parts are {children}") from None
    for word in reversed(path):
        part = nn.Sequential(OrderedDict([(word, part)]))
    return part


def torchvision_weights(name: str) -> dict[str, Any]:
    """torchvision's own trained weights for a network, by name ("DEFAULT" is one of them); empty for any other network.

    A value is a member of torchvision's enumeration, for `torchvision_tensors`.
    """
    if not name.startswith(TORCHVISION):
        return {}
    from torchvision import models

    return dict(models.get_model_weights(_network_name(name)).__members__)


def torchvision_tensors(weights: Any) -> dict[str, torch.Tensor]:
    """The tensors of a member of `torchvision_weights`, from torchvision's cache or the network; checked by hash."""
    tensors: dict[str, torch.Tensor] = weights.get_state_dict(progress=False, check_hash=True, map_location="cpu")
    return tensors


def torchvision_classes(name: str) -> tuple[str, ...]:
    """Names of the classes of torchvision's trained weights; empty where it has none."""
    weights = torchvision_weights(name)
    return tuple(weights["DEFAULT"].meta.get("categories", ())) if weights else ()


def torchvision_preprocessing(name: str, weights: str = "DEFAULT") -> Preprocessing:
    """How torchvision prepares images for trained weights; its resizing is bilinear here, whatever it is there.

    Args:
        name: a network of torchvision.
        weights: one of `torchvision_weights`; sizes differ between them.
    """
    found = torchvision_weights(name)
    if not found:
        return Preprocessing(resize_px=PAPERS_RESIZE_PX, crop_px=PAPERS_CROP_PX, maximum=1.0)
    transform = found[weights].transforms()
    resize_px, crop_px = int(transform.resize_size[0]), int(transform.crop_size[0])
    scaled_to_one = _network_name(name) in _SCALED_TO_ONE
    mean, std = ((0.5,) * 3, (0.5,) * 3) if scaled_to_one else (transform.mean, transform.std)
    return Preprocessing(
        resize_px=max(resize_px, crop_px),
        crop_px=crop_px,
        maximum=1.0,
        mean=torch.tensor(mean).view(3, 1, 1),
        std=torch.tensor(std).view(3, 1, 1),
    )


def _network_name(name: str) -> str:
    return name.removeprefix(TORCHVISION).split(".")[0]
