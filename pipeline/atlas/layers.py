"""Layer pages: figure 2 of the paper, for every feature map."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.atlas import sprites
from pipeline.atlas.records import FeatureMap, Layer, Sources
from pipeline.atlas.site import Site
from pipeline.progress import say
from pipeline.runs import file_stem


@dataclass(frozen=True)
class Face:
    """What other pages show of a layer and link to."""

    layer: Layer
    page: str
    thumbnail: str | None
    thumbnail_maps: tuple[int, ...] = ()


def write(site: Site, sources: Sources, tile_px: int) -> list[Face]:
    """A page for each layer, with a picture for each map that was projected. Only one layer is held in memory."""
    names = sources.layers()
    faces: list[Face] = []
    for place, name in enumerate(names):
        started = time.monotonic()
        layer = sources.layer(name)
        drawn, thumbnail_maps = _pictures(site, sources, layer, tile_px)
        width, height = sprites.size(tile_px)
        site.write_page(
            _page(name),
            "layer.html.j2",
            run_name=sources.run.location.name,
            layer=layer,
            drawn=drawn,
            sprite_width=width,
            sprite_height=height,
            describe=_in_words,
            before=_link(names, place - 1),
            after=_link(names, place + 1),
            run_path=str(sources.run.location),
            deconv_table=sources.deconv,
        )
        faces.append(Face(layer, _page(name), _thumbnail(name) if thumbnail_maps else None, thumbnail_maps))
        say(f"atlas: {name}, {len(layer.maps)} feature maps, {time.monotonic() - started:.1f} s")
    return faces


def _page(layer: str) -> str:
    return f"layers/{file_stem(layer)}.html"


def _assets(layer: str) -> str:
    return f"assets/{file_stem(layer)}"


def _thumbnail(layer: str) -> str:
    return f"{_assets(layer)}/layer.webp"


def _link(names: list[str], place: int) -> tuple[str, str] | None:
    """Name and page of a neighbour."""
    return (names[place], _page(names[place])) if 0 <= place < len(names) else None


def _pictures(site: Site, sources: Sources, layer: Layer, tile_px: int) -> tuple[dict[int, str], tuple[int, ...]]:
    """Write the layer's sprites and its thumbnail. Returns the sprite of each map, and the maps on the thumbnail."""
    location = sources.slice(sources.deconv, layer.name)
    if location is None:
        return {}, ()
    chosen = set(_evenly([map_.number for map_ in layer.maps if map_.entries], sprites.THUMBNAILS))
    tiles, drawn = {}, {}
    for sprite in sprites.sprites(location, tile_px, sources.input_px):
        drawn[sprite.feature_map] = f"{_assets(layer.name)}/map-{sprite.feature_map:04d}.webp"
        site.write(drawn[sprite.feature_map], sprite.data)
        if sprite.feature_map in chosen:
            tiles[sprite.feature_map] = sprite.first
    if tiles:
        site.write(_thumbnail(layer.name), sprites.thumbnail(list(tiles.values())))
    return drawn, tuple(tiles)


def _evenly(numbers: list[int], wanted: int) -> Iterator[int]:
    """At most so many of the numbers, spread evenly over all of them: a fair sample, not the prettiest."""
    for place in np.linspace(0, len(numbers) - 1, min(wanted, len(numbers))).round().astype(int).tolist():
        yield numbers[place]


def _in_words(map_: FeatureMap, layer: Layer) -> str:
    """What a map's picture shows, for readers who do not see it."""
    classes = ", ".join(f"{name or 'no label'} ({count})" for name, count in map_.classes)
    return (
        f"Map {map_.number} of {layer.name}: on the left the projections of its {len(map_.entries)} strongest cells, "
        f"on the right the image patches that caused them. Classes: {classes}"
    )
