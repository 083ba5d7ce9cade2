"""Networks by name. `build("zfnet")` is the paper's; `names()` lists what there is."""

from __future__ import annotations

import difflib

from zfnet.models.layers import Network
from zfnet.models.zfnet import ZFNET, ZFNET_SMALL

__all__ = ["Network", "build", "names"]

_ARCHITECTURES = {architecture.name: architecture for architecture in (ZFNET, ZFNET_SMALL)}


def names() -> tuple[str, ...]:
    """Every name that `build` takes."""
    return tuple(_ARCHITECTURES)


def build(name: str, classes: int = 1000) -> Network:
    """Build the network of that name, with torch's weights; `zfnet.recipe.initialise` gives it the paper's.

    Args:
        name: one of `names()`.
        classes: outputs of the last layer; ImageNet has 1000.

    Raises:
        ValueError: no network has that name; the message suggests the nearest.
    """
    if name not in _ARCHITECTURES:
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0)[0]
        raise ValueError(f"no network is called {name!r}; expected one of {', '.join(names())}. Did you mean {near!r}?")
    return Network(_ARCHITECTURES[name], classes)
