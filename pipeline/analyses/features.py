"""The activations of chosen layers for every image: the features that transfer and retrieval work on.

A row for each image, in the order of the shards. A slice is a layer of one split, so several splits of the same shards
lie side by side in one table; another set of images, or another --pool, goes into a table of another --name.
"""

from __future__ import annotations

import json
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
from pipeline.context import Batch, Context, Picture
from pipeline.runs import RunError, require_at_least_one
from pipeline.storage import Location
from zfnet.activations import NotFinite

Pool = Literal["mean", "max", "flat"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of features."""

    layers: tuple[str, ...] = ()
    """Layers; default all convolutional and fully connected ones. Other traced operations, a pool say, may be named."""
    pool: Pool = "mean"
    """One value a feature map: the mean or the max over its cells; or flat: all cells, row-major, map after map."""
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


SPLIT = tables.column("split", pa.string(), "Split of the shards that holds the sample.")

BOX_LABELS = tables.column(
    "box_labels",
    pa.list_(pa.string()),
    "Classes of the boxes in the sample's json, sorted, each once; null where it lists none.",
    nullable=True,
)

SCHEMA = pa.schema(
    [
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        SPLIT,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        BOX_LABELS,
        tables.column("pool", pa.string(), "mean or max over each feature map, or flat: maps x rows x columns."),
        tables.column("maps", pa.int32(), "Feature maps of the layer."),
        tables.column("map_height", pa.int32(), "Rows of a feature map, before pooling."),
        tables.column("map_width", pa.int32(), "Columns of a feature map, before pooling."),
        tables.column("features", pa.list_(pa.float32()), "The activations, after ReLU where one follows."),
    ]
)


def slice_of(layer: str, split: str) -> str:
    """The slice that holds a layer of a split."""
    return f"{layer}-{split}"


def resolve(context: Context) -> Config:
    """The configuration. Raises: RunError where the features would take more than --max-gb."""
    config: Config = context.config
    images = context.index.split(context.split).num_rows
    forecast = {
        pool: 4 * images * sum(_values(context, layer, pool) for layer in _layers(context)) / 1e9
        for pool in ("mean", config.pool)
    }
    if forecast[config.pool] > config.max_gb:
        pooled = f"--pool mean or max ({forecast['mean']:.3g} GB), " if config.pool == "flat" else ""
        raise RunError(
            f"the features of {images} images would take {forecast[config.pool]:.3g} GB and --max-gb is "
            f"{config.max_gb:g}: give {pooled}fewer --layers, or a larger --max-gb"
        )
    return config


def _layers(context: Context) -> list[str]:
    """The layers asked for. Raises: UnknownLayer, RunError for what has no feature maps."""
    layers = list(context.config.layers or context.graph.layers)
    for layer in layers:
        if len(_shape(context, layer)) not in (1, 3):
            raise RunError(
                f"{layer} gives values of the shape {_shape(context, layer)}, and features are feature maps or units: "
                f"choose among {', '.join(context.graph.layers)}"
            )
    return layers


def _shape(context: Context, layer: str) -> tuple[int, ...]:
    return context.graph[context.graph.activation_of(layer)].shape


def _values(context: Context, layer: str, pool: str) -> int:
    """Values of an image."""
    shape = _shape(context, layer)
    return int(np.prod(shape)) if pool == "flat" else shape[0]


def slices(context: Context) -> list[str]:
    """Each layer of the split."""
    return [slice_of(layer, context.split) for layer in _layers(context)]


def samples(context: Context, slices: list[str]) -> pa.Table:
    """All samples of the split."""
    return context.index.split(context.split)


def setup(context: Context, slices: list[str]) -> list[str]:
    """The layers of these slices."""
    return [slice_.removesuffix(slice_of("", context.split)) for slice_ in slices]


def map_batch(context: Context, layers: list[str], batch: Batch) -> pa.Table:
    """The rows of a batch in each of the layers. Only what the layers need is run."""
    nodes = {layer: context.graph.activation_of(layer) for layer in layers}
    activations = context.graph.run(batch.x, list(nodes.values()))
    images = _image_columns(context, batch.pictures)
    return pa.concat_tables(_rows(context, layer, images, activations[node]) for layer, node in nodes.items())


def _image_columns(context: Context, pictures: list[Picture]) -> dict[str, Any]:
    labels = [picture.sample.label for picture in pictures]
    return {
        **{name: [value] * len(pictures) for name, value in context.identity.items()},
        "split": [context.split] * len(pictures),
        "key": [picture.sample.key for picture in pictures],
        "shard": [picture.sample.shard for picture in pictures],
        "label": labels,
        "label_name": [context.index.label_name(label) for label in labels],
        "box_labels": [_box_labels(picture) for picture in pictures],
    }


def _box_labels(picture: Picture) -> list[str] | None:
    """The classes of an image's boxes; None where its json, if there is any, lists none."""
    try:
        boxes = json.loads(picture.sample.members.get("json", b"{}"))["boxes"]
        return sorted({str(box["label"]) for box in boxes}) or None
    except (ValueError, KeyError, TypeError):
        return None


def _rows(context: Context, layer: str, images: dict[str, Any], activation: Tensor) -> pa.Table:
    maps, height, width = (*activation.shape[1:], 1, 1)[:3]
    count, config = len(activation), context.config
    columns = {
        **images,
        "layer": [layer] * count,
        "pool": [config.pool] * count,
        "maps": [maps] * count,
        "map_height": [height] * count,
        "map_width": [width] * count,
        "features": tables.flat_lists(list(pooled(activation, config.pool)), pa.float32()),
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
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    expected_rows=expected_rows,
)
