"""Where pages are, and what they show of each other: addresses stay the same however often an atlas is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.runs import file_stem

COLOUR_BAR = "assets/colour-bar.png"
"""The colours of all heat maps, from dark to light."""


@dataclass(frozen=True)
class Link:
    """A page and what to call it."""

    name: str
    page: str
    """From the atlas's folder."""


@dataclass(frozen=True)
class Picture:
    """What other pages show of an image's page and link to."""

    page: str
    thumbnail: str
    key: str
    label: str | None
    clean_class: str
    right: bool | None
    """Whether the most probable class is the true one; None without a label."""
    layer: str
    feature_map: int
    """The map that answers strongest to the image."""
    drop: float
    """How much probability of its class the worst place of the square costs."""


def layer_page(layer: str) -> str:
    """The page of a layer."""
    return f"layers/{file_stem(layer)}.html"


def map_page(layer: str, number: int) -> str:
    """The page of a feature map."""
    return f"maps/{file_stem(layer)}/{number}.html"


def image_page(number: int) -> str:
    """The page of an image of the occlusion table, by its place there."""
    return f"images/occlusion-{number}.html"


def neighbours(links: Sequence[Link], place: int) -> tuple[Link | None, Link | None]:
    """The pages before and after one of these."""
    before = links[place - 1] if place > 0 else None
    after = links[place + 1] if place + 1 < len(links) else None
    return before, after
