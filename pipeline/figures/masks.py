"""ZFNet figure 8: the images of the correspondence analysis with the parts that were hidden."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from pipeline.drawing.tiles import image_of
from pipeline.figures.sheet import picture, sheet
from pipeline.figures.source import Source
from pipeline.fills import Hider

PARTS = 6  # columns beside the original


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """A row for each image: the original, then each part hidden. Raises: Missing."""
    columns = ["key", "parts", "mask_tops", "mask_lefts", "mask_px", "image_png"]
    rows = source.rows("correspondence_images", columns)[: source.images]
    fill = source.rows("correspondence", ["fill"])[0]["fill"]
    hider = Hider(source.run)
    shown = min(PARTS, max(len(row["parts"]) for row in rows))
    figure, axes = sheet(len(rows), 1 + shown, width=1.3 * (1 + shown), height=1.4 * len(rows) + 0.2)
    for number, (line, row) in enumerate(zip(axes, rows, strict=True)):
        picture(line[0], image_of(row), "" if number else "original")
        for place, axis in enumerate(line[1:]):
            axis.set_axis_off()
            if place < len(row["parts"]):
                where = (row["mask_tops"][place], row["mask_lefts"][place], row["mask_px"], row["mask_px"])
                picture(axis, hider.hidden(image_of(row), fill, where), "" if number else row["parts"][place])
    yield "figure8", figure
