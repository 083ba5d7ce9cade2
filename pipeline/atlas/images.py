"""Image pages: figure 7 of the paper (figure 6 of its printed edition), for every image of the occlusion table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from pipeline import tables
from pipeline.atlas import boxes, mentions
from pipeline.atlas.catalogue import ResultTable
from pipeline.atlas.class_maps import ImageMaps
from pipeline.atlas.pages import COLOUR_BAR, Link, Picture, image_page, layer_page, map_page, neighbours
from pipeline.atlas.records import SEMANTICS, Sources
from pipeline.atlas.site import Site
from pipeline.atlas.sprites import webp
from pipeline.drawing.heatmaps import Frame, Heat, LegendEntry, class_colours, colour_table, heat
from pipeline.drawing.tiles import around_grey, image_of
from pipeline.fills import Hider
from pipeline.progress import say
from pipeline.projections import relative
from zfnet.images import Pixels

_THUMBNAIL_PX = 160


@dataclass(frozen=True)
class Panels:
    """All that an occlusion page draws."""

    width: int
    height: int
    frame: Frame
    example: tuple[int, int]
    """Position (row, col) of the square where the target is least probable."""
    lowest: float
    values: dict[str, str]
    """The numbers of each map, in reading order, for a hover."""
    names: list[tuple[int, str]]
    """Every class of the class map."""
    activation: Heat
    probability: Heat
    legend: list[tuple[LegendEntry, str]]
    projection: tuple[int, int, int, int]
    """Top, left, height, width of the projection in the image."""


@dataclass(frozen=True)
class Ranked:
    """A class among the five most probable."""

    name: str
    number: int
    probability: float


@dataclass(frozen=True)
class Told:
    """What other tables say of the images, by their keys."""

    mentions: dict[str, list[mentions.Mention]]
    boxes: dict[str, list[boxes.Box]]
    class_maps: dict[str, list[ImageMaps]]

    def of(self, key: str) -> dict[str, Any]:
        """What the page of an image shows of it."""
        drawn = self.boxes.get(key, [])
        return {
            "boxes": drawn,
            "kinds": boxes.kinds(drawn),
            "mentions": self.mentions.get(key, []),
            "maps_of_classes": self.class_maps.get(key, []),
        }


def write(
    site: Site,
    sources: Sources,
    found: Sequence[ResultTable],
    facts: dict[str, Any],
    maps_of_classes: Sequence[ImageMaps],
    most: int,
) -> list[Picture]:
    """A page for each image of the occlusion table, in its order; one image is held in memory at a time."""
    total = min(most, sum(entry["rows"] for entry in sources.run.manifest(sources.occlusion).values()))
    if not total:
        return []
    site.write_image(COLOUR_BAR, colour_table()[None])
    told = _told(sources, found, facts, maps_of_classes, total)
    links = [Link(f"Image {number}", image_page(number)) for number in range(1, total + 1)]
    known_layers, hider = set(sources.layers()), Hider(sources.run)
    pictures = []
    for number, row in enumerate(islice(sources.occlusion_rows(), total), start=1):
        pictures.append(_picture(site, number, row))
        before, after = neighbours(links, number - 1)
        site.write_page(
            image_page(number),
            "image.html.j2",
            run_name=sources.run.location.name,
            number=number,
            total=total,
            before=before,
            after=after,
            picture=pictures[-1],
            layer_page=layer_page(row["layer"]) if row["layer"] in known_layers else None,
            **_of_row(site, hider, number, row, facts["classes"]),
            **told.of(row["key"]),
        )
    say(f"atlas: {total} image pages")
    return pictures


def _told(
    sources: Sources,
    found: Sequence[ResultTable],
    facts: dict[str, Any],
    maps_of_classes: Sequence[ImageMaps],
    total: int,
) -> Told:
    keys, data_id = _keys(sources, total), _data_id(sources)
    class_maps: dict[str, list[ImageMaps]] = {}
    for one in maps_of_classes:
        if data_id in (None, one.data_id):
            class_maps.setdefault(one.key, []).append(one)
    return Told(
        mentions.of_images(sources.run, found, keys, data_id),
        boxes.on_inputs(sources.run, found, keys, data_id, _inputs(facts)),
        class_maps,
    )


def _of_row(site: Site, hider: Hider, number: int, row: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """What the page shows of the table's row; writes its panels."""
    return {
        "row": row,
        "panels": _panels(site, hider, number, row, classes),
        "target": _class_name(row["target_class"], classes),
        "is_label": row["target_class"] == row["label"],
        "before_top5": _top5(row, "clean", classes),
        "after_top5": _top5(row, "lowest", classes),
        "semantics_used": {name: row[name] for name in SEMANTICS},
        "asset": partial(_asset, number),
        "colour_bar": COLOUR_BAR,
        "map_page": map_page(row["layer"], row["feature_map"]),
    }


def _keys(sources: Sources, total: int) -> list[str]:
    """The keys of the images that get a page."""
    keys: list[str] = []
    for name in sources.run.manifest(sources.occlusion):
        location = sources.slice(sources.occlusion, name)
        assert location is not None
        with location.open() as file:
            keys += tables.opened(file).read(["key"])["key"].to_pylist()
    return keys[:total]


def _data_id(sources: Sources) -> str | None:
    """The set of images that the occlusion table is of."""
    entries = sources.run.manifest(sources.occlusion).values()
    return next((entry.get("fingerprint", {}).get("data_id") for entry in entries), None)


def _inputs(facts: dict[str, Any]) -> boxes.Inputs:
    return boxes.Inputs(facts["preprocessing"]["resize_px"], facts["preprocessing"]["crop_px"])


def _top5(row: dict[str, Any], which: str, classes: list[str]) -> list[Ranked]:
    """The five most probable classes of the image as it is, or with the square at its worst; none in older tables."""
    numbers, probabilities = (row.get(f"{which}_top5_{what}", ()) for what in ("classes", "probabilities"))
    return [Ranked(_class_name(int(n), classes), int(n), float(p)) for n, p in zip(numbers, probabilities, strict=True)]


def _asset(number: int, panel: str) -> str:
    return f"assets/occlusion/{number}-{panel}.png"


def _picture(site: Site, number: int, row: dict[str, Any]) -> Picture:
    """Write the image and its thumbnail."""
    pixels = image_of(row)
    site.write_image(_asset(number, "image"), pixels)
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    thumbnail = f"assets/occlusion/{number}-thumbnail.webp"
    site.write(thumbnail, webp(image))
    return Picture(
        page=image_page(number),
        thumbnail=thumbnail,
        key=row["key"],
        label=row["label_name"],
        clean_class=row["clean_class_name"],
        right=None if row["label_name"] is None else row["clean_class"] == row["label"],
        layer=row["layer"],
        feature_map=row["feature_map"],
        drop=row["clean_probability"] - float(row["probability_map"].min()),
    )


def _panels(site: Site, hider: Hider, number: int, row: dict[str, Any], classes: list[str]) -> Panels:
    """Write the maps and the projection, and say where they lie on the image."""
    frame = Frame(*(row[name] for name in ("grid_rows", "grid_cols", "occluder_px", "occluder_width_px", "stride_px")))
    grid = (frame.rows, frame.cols)
    activation, probability = (heat(row[f"{name}_map"].reshape(grid)) for name in ("activation", "probability"))
    drawn, legend = class_colours(row["class_map"].reshape(grid), row["target_class"])
    projection = around_grey(relative(row))
    panels = {"activation": activation.pixels, "probability": probability.pixels, "class": drawn}
    for panel, pixels in {**panels, "projection": projection}.items():
        site.write_image(_asset(number, panel), pixels)
    lowest = int(np.argmin(row["probability_map"]))
    example = divmod(lowest, frame.cols)
    image = _hidden(hider, row, frame, example)
    site.write_image(_asset(number, "hidden"), image)
    height, width = image.shape[:2]
    return Panels(
        width,
        height,
        frame,
        example,
        float(row["probability_map"][lowest]),
        {
            "activation": " ".join(f"{value:.4g}" for value in row["activation_map"].tolist()),
            "probability": " ".join(f"{value:.4f}" for value in row["probability_map"].tolist()),
            "class": " ".join(map(str, row["class_map"].tolist())),
        },
        [(number, _class_name(number, classes)) for number in np.unique(row["class_map"]).tolist()],
        activation,
        probability,
        [(entry, _legend_name(entry, classes)) for entry in legend],
        (max(row["top"], 0), max(row["left"], 0), *projection.shape[:2]),
    )


def _hidden(hider: Hider, row: dict[str, Any], frame: Frame, example: tuple[int, int]) -> Pixels:
    """The image with the square at one of its positions; grey stands for the mean where the network is not there."""
    top, left = (place * frame.stride_px for place in example)
    place = (top, left, row["occluder_px"], row["occluder_width_px"])
    there = row["fill"] != "mean" or (hider.run.location / "run.json").exists()
    return hider.hidden(image_of(row), row["fill"] if there else "128", place)


def _legend_name(entry: LegendEntry, classes: list[str]) -> str:
    return f"{entry.classes} other classes" if entry.number is None else _class_name(entry.number, classes)


def _class_name(number: int, classes: list[str]) -> str:
    return classes[number] if 0 <= number < len(classes) else f"class {number}"
