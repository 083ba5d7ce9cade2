"""The activations of chosen layers for every image: the features that transfer and retrieval work on.

A row for each image, in the order of the shards. A slice is a layer of one split, so several splits of the same shards
lie side by side in one table; another set of images, another --pool or --scale, goes into a table of another --name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from pipeline import tables
from pipeline.analysis import Analysis, Finished
from pipeline.context import Context, centre_crops, normalised
from pipeline.objects import labels_of
from pipeline.runs import RunError, require_at_least_one
from pipeline.shards import Sample, Skipped
from pipeline.storage import Location
from pipeline.views import at_scales, checked_scales, scaled, sliding_of
from zfnet.activations import NotFinite
from zfnet.dense import Stride

Pool = Literal["mean", "max", "flat"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of features."""

    layers: tuple[str, ...] = ()
    """Layers; default all convolutional and fully connected ones. Other traced operations, a pool say, may be named."""
    pool: Pool = "mean"
    """One value a feature map: the mean or the max over its cells; or flat: all cells, row-major, map after map."""
    scale: int | None = None
    """Of an OverFeat network: the image at this one of the paper's six scales; default the centre crop."""
    stride: Stride = "fine"
    """With --scale, above the last pool: fine: a cell for each of its offsets; coarse: for the first alone."""
    part_size: int = 64
    """Images of a part, the unit of work and of resume."""
    batch_size: int = 16
    """Images that go through the network together."""
    max_gb: float = 2.0
    """Refuse to begin where the features of the split would take more gigabytes than this."""

    def __post_init__(self) -> None:
        if not self.max_gb > 0:
            raise RunError(f"--max-gb is {self.max_gb}: give gigabytes above 0")
        require_at_least_one(self, "part_size", "batch_size")
        if self.scale is not None:
            checked_scales([self.scale])
        elif self.stride != "fine":
            raise RunError("--stride goes with --scale: give one of 1 to 6")


SPLIT = tables.column("split", pa.string(), "Split of the shards that holds the sample.")

BOX_LABELS = tables.or_null(
    "box_labels",
    pa.list_(pa.string()),
    "Classes of the boxes in the sample's json, sorted, each once; null where it lists none.",
)

SCHEMA = tables.schema(
    "features",
    row="an image: a layer's activations, pooled or all of them",
    file="layer and split",
    key=("layer", "split", "key"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        SPLIT,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        BOX_LABELS,
        tables.or_null("scale", pa.int32(), "Scale of the image, 1 to 6; null for the centre crop."),
        tables.or_null("stride", pa.string(), "fine or coarse; null for the centre crop."),
        tables.column("pool", pa.string(), "mean or max over each feature map, or flat: maps x rows x columns."),
        tables.column("maps", pa.int32(), "Feature maps of the layer."),
        tables.column("map_height", pa.int32(), "Rows of a feature map, before pooling."),
        tables.column("map_width", pa.int32(), "Columns of a feature map, before pooling."),
        tables.column("features", pa.list_(pa.float32()), "The activations, after ReLU where one follows."),
    ],
)


def slice_of(layer: str, split: str) -> str:
    """The slice that holds a layer of a split."""
    return f"{layer}-{split}"


def resolve(context: Context) -> Config:
    """The configuration. Raises: RunError where the features would take more than --max-gb."""
    config: Config = context.config
    images = context.index.split(context.split).num_rows
    shapes = _shapes(context).values()
    values = {"flat": sum(math.prod(shape) for shape in shapes), "mean": sum(shape[0] for shape in shapes)}
    forecast = {pool: 4 * images * count / 1e9 for pool, count in values.items()}
    needed = forecast["flat" if config.pool == "flat" else "mean"]
    if needed > config.max_gb:
        pooled = f"--pool mean or max ({forecast['mean']:.3g} GB), " if config.pool == "flat" else ""
        raise RunError(
            f"the features of {images} images would take {needed:.3g} GB and --max-gb is "
            f"{config.max_gb:g}: give {pooled}fewer --layers, or a larger --max-gb"
        )
    return config


def _shapes(context: Context) -> dict[str, tuple[int, ...]]:
    """Layers asked for -> the shape of their activations; at a scale of its largest images.

    Raises: UnknownLayer, RunError for what has no feature maps, or cannot be had at a scale.
    """
    nodes = {layer: context.graph.activation_of(layer) for layer in context.config.layers or context.graph.layers}
    shapes = {layer: context.graph[node].shape for layer, node in nodes.items()}
    for layer, shape in shapes.items():
        if len(shape) not in (1, 3):
            raise RunError(
                f"{layer} gives values of the shape {shape}, and features are feature maps or units: "
                f"choose among {', '.join(context.graph.layers)}"
            )
    if context.config.scale is None:
        return shapes
    sliding = sliding_of(context.model, context.run.location)
    blank = torch.zeros(1, 3, *sliding.sides_px(context.config.scale), device=context.device)
    try:
        with torch.inference_mode():
            found = sliding.activations(blank, list(nodes.values()), context.config.stride)
    except ValueError as error:
        raise RunError(f"--layers: {error}") from None
    return {layer: tuple(found[node].shape[1:]) for layer, node in nodes.items()}


def slices(context: Context) -> list[str]:
    """Each layer of the split."""
    return [slice_of(layer, context.split) for layer in context.config.layers or context.graph.layers]


def samples(context: Context, slices: list[str]) -> pa.Table:
    """All samples of the split."""
    return context.index.split(context.split)


def setup(context: Context, slices: list[str]) -> list[str]:
    """The layers of these slices."""
    return [slice_.removesuffix(slice_of("", context.split)) for slice_ in slices]


def decode(context: Context, layers: list[str], rows: pa.Table) -> tuple[list[Any], list[Skipped]]:
    """The images' centre crops, or the images at the scale."""
    scale = context.config.scale
    return centre_crops(context, layers, rows) if scale is None else at_scales(context, (scale,), rows)


def as_batch(context: Context, layers: list[str], pictures: list[Any]) -> Any:
    """They as the network sees them."""
    return (normalised if context.config.scale is None else scaled)(context, layers, pictures)


def map_batch(context: Context, layers: list[str], batch: Any) -> pa.Table:
    """The rows of a batch in each of the layers. Only what the layers need is run."""
    nodes = {layer: context.graph.activation_of(layer) for layer in layers}
    found: dict[str, dict[int, Row]] = {layer: {} for layer in layers}
    for places, activations in _activations(context, list(nodes.values()), batch):
        for layer, node in nodes.items():
            found[layer].update(zip(places, _vectors(activations[node], context.config.pool, places), strict=True))
    images = _image_columns(context, [picture.sample for picture in batch.pictures])
    return pa.concat_tables(_rows(context, layer, images, [of[i] for i in sorted(of)]) for layer, of in found.items())


def _activations(context: Context, nodes: list[str], batch: Any) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Of images of one size together, their places in the batch and what the operations give."""
    config: Config = context.config
    if config.scale is None:
        yield list(range(len(batch.pictures))), context.graph.run(batch.x, nodes)
        return
    sliding = sliding_of(context.model, context.run.location)
    for places, x in batch.at_scale[0]:
        yield places, sliding.activations(x, nodes, config.stride)


Row = tuple[tuple[int, int, int], npt.NDArray[np.float32]]
"""Feature maps, rows, columns; and the features of one image."""


def _vectors(activation: Tensor, pool: Pool, places: list[int]) -> list[Row]:
    maps, height, width = (*activation.shape[1:], 1, 1)[:3]
    try:
        return [((maps, height, width), vector) for vector in pooled(activation, pool)]
    except NotFinite as error:
        raise NotFinite(places[error.index], error.feature_map) from None


def _image_columns(context: Context, samples: list[Sample]) -> dict[str, Any]:
    labels = [sample.label for sample in samples]
    return {
        **{name: [value] * len(samples) for name, value in context.identity.items()},
        "split": [context.split] * len(samples),
        "key": [sample.key for sample in samples],
        "shard": [sample.shard for sample in samples],
        "label": labels,
        "label_name": [context.index.label_name(label) for label in labels],
        "box_labels": [labels_of(sample) or None for sample in samples],
    }


def _rows(context: Context, layer: str, images: dict[str, Any], rows: list[Row]) -> pa.Table:
    count, config = len(rows), context.config
    maps, height, width = zip(*(shape for shape, _ in rows), strict=True)
    columns = {
        **images,
        "layer": [layer] * count,
        "scale": [config.scale] * count,
        "stride": [None if config.scale is None else config.stride] * count,
        "pool": [config.pool] * count,
        "maps": maps,
        "map_height": height,
        "map_width": width,
        "features": tables.flat_lists([vector for _, vector in rows], pa.float32()),
    }
    return tables.conform(columns, SCHEMA)


def pooled(activation: Tensor, pool: Pool) -> npt.NDArray[np.float32]:
    """Activations [N, maps, rows, columns] or [N, units] as one vector an image.

    Raises: NotFinite where an activation is NaN or infinite.
    """
    cells = activation.reshape(*activation.shape[:2], -1)
    if not torch.isfinite(cells).all():
        image, feature_map = (~torch.isfinite(cells)).any(-1).nonzero()[0].tolist()
        raise NotFinite(image, feature_map)
    found = {"mean": lambda: cells.mean(-1), "max": lambda: cells.amax(-1), "flat": lambda: cells.flatten(1)}[pool]()
    return np.asarray(found.to(torch.float32).cpu())


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """All rows of a part, layer after layer, each in the order of the images."""
    table = pa.concat_tables([SCHEMA.empty_table(), *results])
    names = table["layer"].combine_chunks().dictionary_encode()
    return table.take(pa.array(np.argsort(np.asarray(names.indices), kind="stable")))


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """A file for each layer of the split."""
    for layer, slice_ in zip(setup(context, slices), slices, strict=True):
        yield Finished("features", slice_, SCHEMA, _of_layer(parts, layer))


def _of_layer(parts: list[Location], layer: str) -> Iterator[pa.Table]:
    """A layer's rows in the order of the parts, so many at a time as fill a row group."""
    gathered, size = [SCHEMA.empty_table()], 0
    for part in parts:
        gathered.append(tables.read(part, filters=[("layer", "=", layer)]))
        size += gathered[-1].nbytes
        if size > tables.ROW_GROUP_BYTES:
            yield pa.concat_tables(gathered)
            gathered, size = [SCHEMA.empty_table()], 0
    yield pa.concat_tables(gathered)


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each image that could be read."""
    return len(context.index.split(context.split)) - len(skipped)


ANALYSIS = Analysis(
    table="features",
    tables=("features",),
    module=__name__,
    part_schema=lambda config: SCHEMA,
    resolve=resolve,
    selects=("layers", "max_gb"),
    slices=slices,
    samples=samples,
    setup=setup,
    decode=decode,
    batch=as_batch,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    expected_rows=expected_rows,
    then="retrieval.py --run {run}",
)
