"""The evolution strip: a feature map's strongest cell, projected at chosen epochs of training (figure 4)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.atlas.records import Sources


@dataclass(frozen=True)
class Strip:
    """A feature map's picture over the epochs, as a WebP file: projections above, patches below."""

    feature_map: int
    data: bytes
    epochs: tuple[int, ...]
    contrasts: tuple[float, ...]
    """Each projection's largest value over the largest of all epochs."""


def strips(sources: Sources, layer: str, tile_px: int) -> Iterator[Strip]:
    """The strips of a layer's maps."""
    return iter(())
