"""ZFNet figure 5 (arXiv v3): how far features move, and the true class's probability, as an image is altered."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.figures.sheet import sheet
from pipeline.figures.source import Row, Source

TRANSFORMS = {
    "vertical": "vertical translation (pixels)",
    "horizontal": "horizontal translation (pixels)",
    "scale": "scale (ratio)",
    "rotation": "rotation (degrees)",
}


def draw(source: Source) -> Iterator[tuple[str, Figure]]:
    """Rows of transforms; a column for each layer's distance, and the probability. Raises: Missing."""
    columns = ["key", "label_name", "transform", "amount", "layer", "distance", "probability"]
    rows = source.rows("invariance", columns)
    keys = list(dict.fromkeys(row["key"] for row in rows))[: source.images]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    transforms = [name for name in TRANSFORMS if any(row["transform"] == name for row in rows)]
    figure, axes = sheet(len(transforms), len(layers) + 1, 2.2 * (len(layers) + 1), 1.7 * len(transforms) + 0.4)
    for line, transform in zip(axes, transforms, strict=True):
        these = sorted((row for row in rows if row["transform"] == transform), key=lambda row: row["amount"])
        for axis, layer in zip(line, layers, strict=False):
            _lines(axis, [row for row in these if row["layer"] == layer], keys, "distance")
            axis.set(ylabel=f"distance, {layer}", xlabel=TRANSFORMS[transform])
        _lines(line[-1], [row for row in these if row["layer"] == layers[0]], keys, "probability")
        line[-1].set(ylabel="probability of the true class", xlabel=TRANSFORMS[transform], ylim=(0, 1))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(keys))
    yield "figure5", figure


def _lines(axis: Axes, rows: list[Row], keys: list[str], value: str) -> None:
    for key in keys:
        one = [row for row in rows if row["key"] == key]
        name = one[0]["label_name"] if one else None
        axis.plot([row["amount"] for row in one], [row[value] for row in one], linewidth=1, label=name or key)
