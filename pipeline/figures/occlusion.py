"""ZFNet figure 7: what hiding a square does to the strongest feature map and to the class, position by position."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pipeline.drawing.heatmaps import class_colours
from pipeline.drawing.tiles import image_of
from pipeline.figures.sheet import Pixels, mosaic, picture, sheet, wrapped
from pipeline.figures.source import Missing, Row, Source
from pipeline.figures.tiles import PLACE, PROJECTION, whole_projection
from pipeline.fills import Hider

OTHERS = 3  # further images that excite the map, as printed
_LONGEST_NAME = 40
_COLUMNS = [
    "key", "label_name", "target_class", "clean_class", "grid_rows", "grid_cols", "occluder_px", "occluder_width_px",
    "stride_px", "fill", "layer", "feature_map", "activation_map", "probability_map", "class_map", "image_png",
    *PLACE, *PROJECTION,
]  # fmt: skip


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """A row for each image: input, activation, projections, probability, most probable class. Raises: Missing."""
    rows = source.rows("occlusion", _COLUMNS)[: source.images]
    classes, hider = source.run.describe()["classes"], Hider(source.run)
    figure, axes = sheet(len(rows), 5, width=11, height=2.1 * len(rows) + 0.3)
    for line, row in zip(axes, rows, strict=True):
        grid = (row["grid_rows"], row["grid_cols"])
        picture(line[0], _with_square(hider, row), f"{row['label_name'] or row['key']}")
        activation = line[1].imshow(row["activation_map"].reshape(grid), cmap="viridis")
        line[1].set_title(wrapped(f"{row['layer']}, map {row['feature_map']}: activation", line[1]))
        picture(line[2], _projections(source, row), "the map's projections")
        probability = line[3].imshow(row["probability_map"].reshape(grid), cmap="viridis")
        line[3].set_title(wrapped(f"probability of {_name(classes, row['target_class'])}", line[3]))
        colours, legend = class_colours(row["class_map"].reshape(grid), row["target_class"])
        picture(line[4], colours, "most probable class")
        handles = [Patch(color=entry.colour, label=_name(classes, entry.number)) for entry in legend[:6]]
        line[4].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis, image in ((line[1], activation), (line[3], probability)):
            axis.set_axis_off()
            figure.colorbar(image, ax=axis, shrink=0.8)
    yield "figure7", figure


def _name(classes: list[str], number: int | None) -> str:
    return "others" if number is None else textwrap.shorten(classes[number], _LONGEST_NAME, placeholder="…")


def _with_square(hider: Hider, row: Row) -> Pixels:
    """The image with the square where it takes most of the probability."""
    top, left = (int(v) * row["stride_px"] for v in divmod(np.argmin(row["probability_map"]), row["grid_cols"]))
    where = (top, left, row["occluder_px"], row["occluder_width_px"])
    return hider.hidden(image_of(row), row["fill"], where)


def _projections(source: Source, row: Row) -> Pixels:
    """Of this image first, then of the other images that excite the map most, where deconv has been run."""
    input_px = source.run.describe()["preprocessing"]["crop_px"]
    found = [row]
    try:
        top = source.rows("deconv", ["feature_map", "rank", "key", *PLACE, *PROJECTION], layer=row["layer"])
    except Missing:
        top = []
    others = [one for one in top if one["feature_map"] == row["feature_map"] and one["key"] != row["key"]]
    found += sorted(others, key=lambda one: one["rank"])[:OTHERS]
    return mosaic([whole_projection(one, input_px) for one in found], min(2, len(found)), gap=4)
