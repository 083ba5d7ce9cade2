"""Layer pages: figure 2 of the paper, for every feature map; and each map's own page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.atlas import evolution, maps, mentions, sprites
from pipeline.atlas.catalogue import ResultTable
from pipeline.atlas.maps import Assets, Otherwise
from pipeline.atlas.pages import Link, Picture, layer_page, map_page, neighbours
from pipeline.atlas.records import FeatureMap, Layer, Sources
from pipeline.atlas.site import Site
from pipeline.atlas.wholes import Pictures
from pipeline.progress import say
from pipeline.runs import file_stem

WHOLE_PX = 96
GROUPS_PX = 64


@dataclass(frozen=True)
class Face:
    """What other pages show of a layer and link to."""

    layer: Layer
    page: str
    thumbnail: str | None
    thumbnail_maps: tuple[int, ...] = ()


def write(
    site: Site, sources: Sources, found: Sequence[ResultTable], pictures: Sequence[Picture], tile_px: int
) -> list[Face]:
    """A page for each layer and each map, with a picture for each that was projected. One layer is held in memory."""
    names = sources.layers()
    others = [table.name for table in found if table.kind == "deconv" and table.name != sources.deconv]
    faces: list[Face] = []
    for place, name in enumerate(names):
        started = time.monotonic()
        layer = sources.layer(name)
        assets, thumbnail_maps = _write_assets(site, sources, layer, tile_px)
        for other in others:
            _write_otherwise(site, sources, layer, assets, other)
        told = mentions.of_maps(sources.run, found, name)
        maps.write(site, sources, layer, assets, pictures, told)
        width, height = sprites.size(tile_px)
        before, after = neighbours([Link(n, layer_page(n)) for n in names], place)
        site.write_page(
            layer_page(name),
            "layer.html.j2",
            run_name=sources.run.location.name,
            layer=layer,
            drawn=assets.sprites,
            sprite_width=width,
            sprite_height=height,
            describe=_in_words,
            search_text=_search_text,
            map_page=partial(map_page, name),
            before=before,
            after=after,
            run_path=str(sources.run.location),
            deconv_table=sources.deconv,
        )
        faces.append(Face(layer, layer_page(name), _thumbnail(name) if thumbnail_maps else None, thumbnail_maps))
        say(f"atlas: {name}, {len(layer.maps)} feature maps, {time.monotonic() - started:.1f} s")
    return faces


def _assets(layer: str) -> str:
    return f"assets/{file_stem(layer)}"


def _thumbnail(layer: str) -> str:
    return f"{_assets(layer)}/layer.webp"


def _write_assets(site: Site, sources: Sources, layer: Layer, tile_px: int) -> tuple[Assets, tuple[int, ...]]:
    """Write the layer's pictures and its thumbnail. Returns where they are, and the maps on the thumbnail."""
    assets = Assets(tile_px=tile_px)
    tiles = {}
    location = sources.slice(sources.deconv, layer.name)
    chosen = set(_evenly([map_.number for map_ in layer.maps if map_.entries], sprites.THUMBNAILS))
    for sprite in sprites.sprites(location, tile_px, sources.input_px) if location else ():
        assets.sprites[sprite.feature_map] = f"{_assets(layer.name)}/map-{sprite.feature_map:04d}.webp"
        site.write(assets.sprites[sprite.feature_map], sprite.data)
        if sprite.feature_map in chosen:
            tiles[sprite.feature_map] = sprite.first
    if tiles:
        site.write(_thumbnail(layer.name), sprites.thumbnail(list(tiles.values())))
    _write_wholes(site, sources, layer, assets)
    for strip in evolution.strips(sources, layer.name, tile_px):
        path = f"{_assets(layer.name)}/map-{strip.feature_map:04d}-epochs.webp"
        site.write(path, strip.data)
        assets.strips[strip.feature_map] = (path, strip)
    return assets, tuple(tiles)


def _write_otherwise(site: Site, sources: Sources, layer: Layer, assets: Assets, table: str) -> None:
    """The pictures that another table of projections has of the layer's maps."""
    if location := sources.slice(table, layer.name):
        semantics = sources.semantics(table, layer.name)
        for sprite in sprites.sprites(location, assets.tile_px, sources.input_px):
            path = f"{_assets(layer.name)}/map-{sprite.feature_map:04d}-{table}.webp"
            site.write(path, sprite.data)
            assets.otherwise[sprite.feature_map].append(Otherwise(table, semantics, path))


def _write_wholes(site: Site, sources: Sources, layer: Layer, assets: Assets) -> None:
    """The whole pictures behind the strongest cells, and behind the groups."""
    strongest = Pictures.of(sources.slice(sources.pictures, layer.name))
    of_groups = Pictures.of(sources.slice(sources.pictures_of_groups, layer.name))

    def write(map_: FeatureMap) -> None:
        stem = f"{_assets(layer.name)}/map-{map_.number:04d}"
        shown = [entry.key for entry in map_.entries[: sprites.SHOWN]]
        if made := strongest.sheet(f"{stem}-whole.webp", shown, WHOLE_PX):
            assets.wholes[map_.number] = made[0]
            site.write(made[0].path, made[1])
        grouped = [entry.key for _, entries in map_.groups for entry in entries]
        if made := of_groups.sheet(f"{stem}-groups.webp", grouped, GROUPS_PX):
            assets.groups[map_.number] = made[0]
            site.write(made[0].path, made[1])

    with ThreadPoolExecutor(sprites.THREADS) as threads:  # decoding, encoding and writing release the lock
        list(threads.map(write, layer.maps))


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


def _search_text(map_: FeatureMap) -> str:
    """What a search on the page looks in: number, classes and keys."""
    words = [str(map_.number), *(entry.label or "" for entry in map_.entries), *(entry.key for entry in map_.entries)]
    return " ".join(dict.fromkeys(word for word in words if word))
