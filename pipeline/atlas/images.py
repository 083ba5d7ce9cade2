"""Occlusion pages: figure 7 of the paper (figure 6 of its printed edition), for every image of the table."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from pipeline.atlas.heatmaps import Frame, Heat, LegendEntry, class_colours, colour_table, heat
from pipeline.atlas.layers import Face
from pipeline.atlas.projections import around_grey
from pipeline.atlas.records import SEMANTICS, Sources
from pipeline.atlas.site import Site
from pipeline.atlas.sprites import webp
from pipeline.progress import say
from pipeline.projections import relative

COLOUR_BAR = "assets/occlusion/colour-bar.png"
_THUMBNAIL_PX = 160


@dataclass(frozen=True)
class Picture:
    """What other pages show of an occluded image and link to."""

    page: str
    thumbnail: str
    key: str
    label: str | None
    clean_class: str
    right: bool | None
    """Whether the most probable class is the true one; None without a label."""


@dataclass(frozen=True)
class Panels:
    """All that an occlusion page draws."""

    width: int
    height: int
    frame: Frame
    example: tuple[int, int]
    """Position (row, col) of the square where the target is least probable."""
    colour: str
    """In which the square is drawn: its own, or a middle grey where it has more than one."""
    lowest: float
    activation: Heat
    probability: Heat
    legend: list[tuple[LegendEntry, str]]
    projection: tuple[int, int, int, int]
    """Top, left, height, width of the projection in the image."""


def write(site: Site, sources: Sources, facts: dict[str, Any], most: int, faces: Mapping[str, Face]) -> list[Picture]:
    """A page for each image of the occlusion table, in its order; one image is held in memory at a time."""
    total = min(most, sum(entry["rows"] for entry in sources.run.manifest(sources.occlusion).values()))
    if not total:
        return []
    site.write_image(COLOUR_BAR, colour_table()[None])
    pictures = []
    for number, row in enumerate(islice(sources.occlusion_rows(), total), start=1):
        pictures.append(_picture(site, number, row))
        face = faces.get(row["layer"])
        site.write_page(
            _page(number),
            "occlusion.html.j2",
            run_name=sources.run.location.name,
            number=number,
            total=total,
            before=_link(number - 1, total),
            after=_link(number + 1, total),
            row=row,
            picture=pictures[-1],
            panels=_panels(site, number, row, facts["classes"]),
            target=_class_name(row["target_class"], facts["classes"]),
            is_label=row["target_class"] == row["label"],
            semantics_used={name: row[name] for name in SEMANTICS},
            asset=partial(_asset, number),
            colour_bar=COLOUR_BAR,
            layer_page=face.page if face else None,
        )
    say(f"atlas: {total} occlusion pages")
    return pictures


def _link(number: int, total: int) -> tuple[str, str] | None:
    """Name and page of a neighbour."""
    return (f"Image {number}", _page(number)) if 1 <= number <= total else None


def _page(number: int) -> str:
    return f"images/occlusion-{number}.html"


def _asset(number: int, panel: str) -> str:
    return f"assets/occlusion/{number}-{panel}.png"


def _picture(site: Site, number: int, row: dict[str, Any]) -> Picture:
    """Write the image and its thumbnail."""
    image = Image.open(io.BytesIO(row["image_png"])).convert("RGB")
    site.write_image(_asset(number, "image"), np.asarray(image))
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    thumbnail = f"assets/occlusion/{number}-thumbnail.webp"
    site.write(thumbnail, webp(image))
    right = None if row["label_name"] is None else row["clean_class"] == row["label"]
    return Picture(_page(number), thumbnail, row["key"], row["label_name"], row["clean_class_name"], right)


def _panels(site: Site, number: int, row: dict[str, Any], classes: list[str]) -> Panels:
    """Write the maps and the projection, and say where they lie on the image."""
    frame = Frame(*(row[name] for name in ("grid_rows", "grid_cols", "occluder_px", "occluder_width_px", "stride_px")))
    grid = (frame.rows, frame.cols)
    activation, probability = (heat(row[f"{name}_map"].reshape(grid)) for name in ("activation", "probability"))
    drawn, legend = class_colours(row["class_map"].reshape(grid), row["target_class"])
    projection = around_grey(relative(row))
    panels = {"activation": activation.pixels, "probability": probability.pixels, "class": drawn}
    for panel, pixels in {**panels, "projection": projection}.items():
        site.write_image(_asset(number, panel), pixels)
    width, height = Image.open(io.BytesIO(row["image_png"])).size
    lowest = int(np.argmin(row["probability_map"]))
    return Panels(
        width,
        height,
        frame,
        divmod(lowest, frame.cols),
        _colour(row["fill"]),
        float(row["probability_map"][lowest]),
        activation,
        probability,
        [(entry, _legend_name(entry, classes)) for entry in legend],
        (max(row["top"], 0), max(row["left"], 0), *projection.shape[:2]),
    )


def _colour(fill: str) -> str:
    parts = ["128"] if fill in ("mean", "blur") else fill.split(",")
    return f"rgb({','.join(parts * (3 // len(parts)))})"


def _legend_name(entry: LegendEntry, classes: list[str]) -> str:
    return f"{entry.classes} other classes" if entry.number is None else _class_name(entry.number, classes)


def _class_name(number: int, classes: list[str]) -> str:
    return classes[number] if 0 <= number < len(classes) else f"class {number}"
