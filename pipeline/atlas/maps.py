"""Feature map pages: all that the tables know of one map, at an address that stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pipeline.atlas import sprites
from pipeline.atlas.charts import Bars, bars, histogram
from pipeline.atlas.evolution import Strip
from pipeline.atlas.mentions import Mention
from pipeline.atlas.pages import Link, Picture, layer_page, map_page, neighbours
from pipeline.atlas.records import Entry, FeatureMap, Layer, Sources
from pipeline.atlas.site import Site
from pipeline.atlas.wholes import Sheet

SIMILAR_SHOWN = 12


class Otherwise(NamedTuple):
    """A map's cells as another table of projections has them."""

    table: str
    semantics: dict[str, str]
    sprite: str


@dataclass
class Assets:
    """The pictures of a layer's maps, by the map's number."""

    tile_px: int
    sprites: dict[int, str] = field(default_factory=dict)
    otherwise: defaultdict[int, list[Otherwise]] = field(default_factory=partial(defaultdict, list))
    wholes: dict[int, Sheet] = field(default_factory=dict)
    groups: dict[int, Sheet] = field(default_factory=dict)
    strips: dict[int, tuple[str, Strip]] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """A part that a page could have, and the job that makes its table."""

    what: str
    table: str
    options: str = ""
    """Of the job, beside --run and --name."""


def write(
    site: Site,
    sources: Sources,
    layer: Layer,
    assets: Assets,
    pictures: Sequence[Picture],
    told: dict[str, list[Mention]],
) -> None:
    """A page for each map of the layer."""
    links = [Link(f"Map {map_.number}", map_page(layer.name, map_.number)) for map_ in layer.maps]
    of_layer = _of_layer(sources, layer, assets, pictures)
    for place, map_ in enumerate(layer.maps):
        before, after = neighbours(links, place)
        site.write_page(
            links[place].page,
            "map.html.j2",
            before=before,
            after=after,
            examples=[p for p in pictures if (p.layer, p.feature_map) == (layer.name, map_.number)],
            mentions=told.get(str(map_.number), []),
            **of_layer,
            **_of_map(map_),
            **_drawn(map_, assets),
        )


def _of_layer(sources: Sources, layer: Layer, assets: Assets, pictures: Sequence[Picture]) -> dict[str, Any]:
    """What the pages of all its maps are given."""
    width, height = sprites.size(assets.tile_px)
    return {
        "run_name": sources.run.location.name,
        "run_path": str(sources.run.location),
        "layer": layer,
        "layer_page": layer_page(layer.name),
        "map_page": partial(map_page, layer.name),
        "deconv_table": sources.deconv,
        "sprite_width": width,
        "sprite_height": height,
        "sprite_of": assets.sprites,
        "tile_px": assets.tile_px,
        "place_of": partial(sprites.place, assets.tile_px),
        "input_px": sources.input_px,
        "field_on_image": partial(_on_image, input_px=sources.input_px),
        "page_of_key": {picture.key: picture.page for picture in pictures},
        "could_have": _missing(sources, layer),
    }


def _of_map(map_: FeatureMap) -> dict[str, Any]:
    """What the tables know of a map."""
    known = map_.statistics
    return {
        "map": map_,
        "shown": map_.entries[: sprites.SHOWN],
        "firsts": _firsts(map_),
        "histogram": histogram(known.histogram, known.edges, known.quantiles) if known else None,
        "classes": _classes(map_),
        "similar": map_.similar[:SIMILAR_SHOWN],
    }


def _drawn(map_: FeatureMap, assets: Assets) -> dict[str, Any]:
    """The pictures of a map, those that there are."""
    return {
        "sprite": assets.sprites.get(map_.number),
        "otherwise": assets.otherwise.get(map_.number, []),
        "whole": assets.wholes.get(map_.number),
        "groups": assets.groups.get(map_.number),
        "strip": assets.strips.get(map_.number),
    }


def _firsts(map_: FeatureMap) -> list[int]:
    """Place of each group's first picture on the sheet of groups."""
    firsts, total = [], 0
    for _, entries in map_.groups:
        firsts.append(total)
        total += len(entries)
    return firsts


def _classes(map_: FeatureMap) -> Bars | None:
    """The classes of the strongest images, as bars."""
    rows = [("no label" if name is None else name, (float(count),)) for name, count in map_.classes]
    return bars(f"Classes of the {len(map_.entries)} strongest images", ("images",), rows)


def _on_image(entry: Entry, input_px: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a cell's receptive field, cut to the image, in input pixels."""
    top, left, height, width = entry.field
    first_row, first_col = max(top, 0), max(left, 0)
    return first_row, first_col, min(top + height, input_px) - first_row, min(left + width, input_px) - first_col


def _missing(sources: Sources, layer: Layer) -> list[Missing]:
    """What the layer's pages could show as well."""
    wanted = [
        (sources.feature_maps, Missing("statistics and histogram", sources.top9)),
        (sources.deconv, Missing("projections and patches", sources.deconv)),
        (sources.pictures, Missing("the whole pictures behind the patches", sources.pictures)),
        (sources.groups, Missing("images from the map’s whole range", sources.groups)),
        (sources.pictures_of_groups, Missing("pictures of these", sources.pictures_of_groups, "--of groups")),
        (sources.duplicates, Missing("maps that answer most alike", sources.duplicates)),
        (sources.evolution, Missing("its evolution over the epochs", sources.evolution)),
        (sources.occlusion, Missing("occlusion examples", sources.occlusion)),
        ("units", Missing("the filter’s condition", "units")),
    ]
    whole = {sources.evolution, sources.occlusion}
    finished = {table: sources.run.manifest(table) for table, _ in wanted}
    return [
        missing
        for table, missing in wanted
        if not (finished[table] if table in whole else layer.name in finished[table])
    ]
