"""What the visualisations were for: each feature map's faults and its specificity, as numbers (ZFNet section 4.1).

A row for each feature map: dead or nearly dead; how large its filter is beside the layer's others, and how like another
one; how many maps answer as it does (table `duplicates`); for the layer that sees the image, how its filter's energy
lies among the frequencies; for that layer and the next, how much of it the first stride aliases; and how its top-9
spread over the classes. Made of weights and finished tables alone: no image, no Ray.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import nn

from pipeline import tables
from pipeline.derive import Context, Derivation, require_slices, source
from pipeline.runs import RunError
from zfnet import filters


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of units."""

    layers: tuple[str, ...] = ()
    """Layers; default all of the table `duplicates`."""
    top9: str = "top9"
    """Table of the strongest cells: top9, or top9-NAME."""
    feature_maps: str = "feature_maps"
    """Table of the maps' statistics, of the same sweep."""
    duplicates: str = "duplicates"
    """Table of maps that answer alike, of the same sweep."""
    nearly_dead: float = 0.01
    """A map is nearly dead if it is active in some images, but in at most this share of them."""
    filter_cosine: float = 0.9
    """A filter is a near-duplicate if its cosine with another one is at least this."""
    dominance: float = 2.0
    """A filter dominates if its root mean square is more than this many times the layer's median."""
    low: float = 0.25
    """Very low frequencies: at most this share of the Nyquist frequency."""
    high: float = 0.75
    """Very high frequencies: at least this share of the Nyquist frequency."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high <= 1:
            raise RunError(f"--low is {self.low}, --high is {self.high}: give 0 < low < high <= 1")
        if not 0 <= self.nearly_dead <= 1:
            raise RunError(f"--nearly-dead is {self.nearly_dead}: give a share from 0 to 1")
        if not -1 <= self.filter_cosine <= 1:
            raise RunError(f"--filter-cosine is {self.filter_cosine}: give a number from -1 to 1")
        if not self.dominance > 0:
            raise RunError(f"--dominance is {self.dominance}: give a number above 0")


SCHEMA = tables.schema(
    "units",
    row="a feature map: its faults, its filter and its classes",
    file="layer",
    key=("layer", "feature_map"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        tables.FEATURE_MAP,
        tables.column("images", pa.int64(), "Images that were swept."),
        tables.column("active_share", pa.float64(), "Share of images with any activation above zero."),
        tables.column("dead", pa.bool_(), "Whether no image has any activation above zero."),
        tables.column("nearly_dead", pa.bool_(), "Whether it is not dead, and active in few images (--nearly-dead)."),
        tables.column("rms", pa.float64(), "Root mean square of the filter's weights."),
        tables.or_null("rms_ratio", pa.float64(), "rms over the layer's median; null where that is zero."),
        tables.column("dominant", pa.bool_(), "Whether rms_ratio is above --dominance."),
        tables.or_null("nearest_map", pa.int32(), "The map whose filter has the largest cosine; null if none."),
        tables.or_null("nearest_cosine", pa.float64(), "That cosine; null for a filter of zeros."),
        tables.column("filter_duplicate", pa.bool_(), "Whether nearest_cosine is at least --filter-cosine."),
        tables.column("response_duplicates", pa.int32(), "Maps that answer as it does, by the table of duplicates."),
        tables.or_null(
            "low_share",
            pa.float64(),
            "Share of the filter's energy at very low frequencies; null above the first layer.",
        ),
        tables.or_null(
            "high_share",
            pa.float64(),
            "Share of the filter's energy at very high frequencies; null above the first layer.",
        ),
        tables.or_null(
            "aliased_share",
            pa.float64(),
            "Share of what it is made of that the first stride aliases; null above the second.",
        ),
        tables.column("labelled", pa.int32(), "Entries of its top-9 that have a class."),
        tables.or_null(
            "class_entropy",
            pa.float64(),
            "Entropy of the classes of its top-9: 0 one class, 1 spread evenly; null below 2.",
        ),
    ],
)


def slices(context: Context) -> list[str]:
    """The layers. Raises: RunError for tables that are missing, and layers that are no convolution or linear module."""
    config: Config = context.config
    layers = require_slices(context, config.duplicates, config.layers, "jobs/duplicates.py")
    for table in (config.top9, config.feature_maps):
        require_slices(context, table, tuple(layers), "jobs/top9.py")
    without = [layer for layer in layers if not isinstance(context.graph[layer].module, nn.Conv2d | nn.Linear)]
    if without:
        raise RunError(f"{', '.join(without)} has no filters: give --layers that are convolution or linear modules")
    return layers


def sources(context: Context, layer: str) -> dict[str, Any]:
    """The slices of the three tables. Raises: RunError where they are of different images."""
    config: Config = context.config
    found = {name: source(context, name, layer) for name in (config.top9, config.feature_maps, config.duplicates)}
    alike = found[config.duplicates]["fingerprint"]["sources"].values()
    swept = [found[config.top9], found[config.feature_maps], *alike]
    if len({entry["fingerprint"]["data_id"] for entry in swept}) > 1:
        raise RunError(
            f"{layer}: {config.top9}, {config.feature_maps} and {config.duplicates} are of different images: name "
            "tables of one sweep with --top9, --feature-maps and --duplicates"
        )
    return found


def make(context: Context, layer: str) -> Iterator[pa.Table]:
    """A layer's rows, by feature map."""
    config: Config = context.config
    known = ["data_id", "feature_map", "images", "active_share", "dead"]
    rows = tables.read(context.run.slice(config.feature_maps, layer), known).sort_by("feature_map")
    active, dead = rows["active_share"].to_numpy(), rows["dead"].to_numpy()
    pairs = tables.read(context.run.slice(config.duplicates, layer), ["feature_map", "other_map", "duplicate"])
    if "duplicate" in pairs.column_names:  # earlier versions kept duplicates alone
        pairs = pairs.filter(pairs["duplicate"])
    alike = np.concatenate([pairs["feature_map"].to_numpy(), pairs["other_map"].to_numpy()]).astype(np.int64)
    columns = {
        "model_id": [context.model.model_id] * len(dead),
        "layer": [layer] * len(dead),
        **{name: rows[name] for name in known},
        "nearly_dead": ~dead & (active <= config.nearly_dead),
        "response_duplicates": np.bincount(alike, minlength=len(dead)),
        **_of_filters(context, layer),
        **_of_classes(context, layer, len(dead)),
    }
    yield tables.conform(columns, SCHEMA)


def _of_filters(context: Context, layer: str) -> dict[str, Any]:
    module = context.graph[layer].module
    assert isinstance(module, nn.Conv2d | nn.Linear)
    weight, config = module.weight.detach(), context.config
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    rms = filters.rms(weight).numpy()
    ratio = rms / (np.median(rms) or np.nan)
    cosine = filters.cosines(weight, groups).nan_to_num(nan=-np.inf).max(1)
    nearest = cosine.values.numpy()
    some = np.isfinite(nearest)
    frequencies = _frequencies(context, layer, module)
    return {
        "rms": rms,
        "rms_ratio": _null_if_not_finite(ratio),
        "dominant": ratio > config.dominance,
        "nearest_map": pa.array(cosine.indices.numpy(), pa.int32(), mask=~some),
        "nearest_cosine": _null_if_not_finite(nearest),
        "filter_duplicate": some & (nearest >= config.filter_cosine),
        **{name: _null_if_not_finite(values) for name, values in frequencies.items()},
    }


def _frequencies(context: Context, layer: str, module: nn.Conv2d | nn.Linear) -> dict[str, npt.NDArray[np.float64]]:
    """low_share and high_share of the layer that sees the image, aliased_share of it and the next; NaN elsewhere."""
    low = high = aliased = np.full(len(module.weight), np.nan)
    if isinstance(module, nn.Conv2d):
        first = filters.first_layer_beneath(context.graph, layer)
        if filters.is_first(context.graph, layer):
            weight, stride = module.weight.detach(), (module.stride[0], module.stride[1])
            low, high = (x.numpy() for x in filters.band_shares(weight, context.config.low, context.config.high))
            aliased = filters.aliased_shares(weight, stride).numpy()
        elif first is not None:
            beneath = context.graph[first].module
            assert isinstance(beneath, nn.Conv2d)
            aliased = filters.aliased_shares_above(beneath, module).numpy()
    return {"low_share": low, "high_share": high, "aliased_share": aliased}


def _null_if_not_finite(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(values, pa.float64(), mask=~np.isfinite(values))


def _of_classes(context: Context, layer: str, maps: int) -> dict[str, Any]:
    rows = tables.read(context.run.slice(context.config.top9, layer), ["feature_map", "label"])
    labels: list[list[int]] = [[] for _ in range(maps)]
    for feature_map, label in zip(rows["feature_map"].to_pylist(), rows["label"].to_pylist(), strict=True):
        if label is not None:
            labels[feature_map].append(label)
    classes = len({label for some in labels for label in some})
    return {
        "labelled": [len(some) for some in labels],
        "class_entropy": [class_entropy(some, classes) for some in labels],
    }


def class_entropy(labels: list[int], classes: int) -> float | None:
    """Entropy of these labels over the largest that as many can have among `classes`; None where that is zero."""
    each, more = divmod(len(labels), classes) if classes else (0, 0)
    largest = _entropy([each + 1] * more + [each] * (classes - more))
    return _entropy(list(Counter(labels).values())) / largest if largest else None


def _entropy(counts: list[int]) -> float:
    shares = [count / sum(counts) for count in counts if count]
    return math.fsum(-share * math.log(share) for share in shares)


ANALYSIS = Derivation(table="units", schema=SCHEMA, slices=slices, sources=sources, make=make)
