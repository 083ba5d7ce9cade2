"""Correspondence: does masking the same part of faces change their features alike? (ZFNet on arXiv v3, section 4.3)

The parts are landmarks in the samples' json: {"landmarks": {"nose": [[x, y]], ...}} in pixels of the original image.
Each is masked in every image, and so are random parts that leave out the named ones; the signs of the changes of a
layer's features are compared between all images. Three tables: `correspondence` (a layer and part: mean and spread),
`correspondence_pairs` (two images), `correspondence_images` (an image and its masks).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from pipeline import tables
from pipeline.analyses.chosen import with_keys
from pipeline.analyses.occlusion import filled
from pipeline.analysis import Analysis, Finished
from pipeline.context import Batch, Context, Picture
from pipeline.fills import require_fill
from pipeline.objects import boxes_of
from pipeline.projections import png
from pipeline.runs import Run, RunError, named
from pipeline.shards import Sample, Skipped
from pipeline.storage import Location
from zfnet import images
from zfnet.activations import NotFinite
from zfnet.correspondence import (
    Box,
    Place,
    centred,
    change_signs,
    lies_inside,
    masked,
    random_places,
    sign_distances,
)
from zfnet.features import features, last_hidden_convolution, last_hidden_layer

SLICE = "images"
RANDOM = "random"
MASK_SHARE = 32 / 224


@dataclass(frozen=True, kw_only=True)
class Config:
    """What decides the content of correspondence."""

    keys: tuple[str, ...] = ()
    """Images by key."""
    where: str | None = None
    """Only images whose json has this field true, such as frontal."""
    first: int = 5
    """At most this many of the images that have every part once, whole inside the network's input, in the order of the
    shards; the paper has 5."""
    parts: tuple[str, ...] = ("right_eye", "left_eye", "nose")
    """Landmarks to mask, as the json calls them."""
    random: int = 5
    """Random parts of each image; they touch none of the named ones."""
    random_in: Literal["box", "image"] = "box"
    """Where the centres of random parts lie: in a box of the sample's json (the paper compares with random parts of the
    object), or anywhere."""
    mask_px: int | None = None
    """Side of the square mask in input pixels; default 32 at an input of 224, in proportion."""
    fill: str = "124"
    """What the mask shows, as --fill of occlusion: a grey from 0 to 255, a colour as R,G,B, mean or blur."""
    layers: tuple[str, ...] = ()
    """Layers to compare; default the last convolution and the last hidden layer (the paper's layers 5 and 7)."""
    least: float = 1e-6
    """Changes of at most this share of the layer's largest activation count as none: rounding has no sign."""
    seed: int = 0
    """Decides the random parts, with the image's key."""
    part_size: int = 16
    """Images of a part, the unit of work and of resume."""

    @property
    def batch_size(self) -> int:
        """Images at a time: one, whose masked copies fill the batch."""
        return 1

    def masks(self) -> list[tuple[str, int]]:
        """Part and repeat of every mask of an image, in the order of the rows."""
        return [(part, 0) for part in self.parts] + [(RANDOM, repeat) for repeat in range(self.random)]

    def __post_init__(self) -> None:
        for name, lowest in (("first", 2), ("part_size", 1), ("random", 0), ("least", 0)):
            if not getattr(self, name) >= lowest:
                raise RunError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give at least {lowest}")
        if self.mask_px is not None and self.mask_px < 1:
            raise RunError(f"--mask-px is {self.mask_px}: give at least 1")
        if RANDOM in self.parts or len(set(self.parts)) < len(self.parts) or not self.parts:
            raise RunError(
                f"--parts is {' '.join(self.parts)!r}: give landmarks, each once, and none called {RANDOM!r}"
            )
        require_fill(self.fill)


PART = tables.column("part", pa.string(), "Landmark that was masked, or random.")
REPEAT = tables.column("repeat", pa.int32(), "Which of the random parts, from 0; 0 for a landmark.")
UNITS = tables.column("units", pa.int64(), "Units of the layer: feature maps times cells.")


CORRESPONDENCE = tables.schema(
    "correspondence",
    row="a layer and a part of faces: how alike masking it changes all images",
    file="",
    key=("layer", "part"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        PART,
        tables.column("images", pa.int64(), "Images that were compared."),
        tables.column("pairs", pa.int64(), "Pairs of images, each once, and for random parts once a repeat."),
        UNITS,
        tables.column(
            "mean",
            pa.float64(),
            "The paper's measure: share of units whose change has another sign, mean over the pairs.",
        ),
        tables.or_null("std_pairs", pa.float64(), "Standard deviation over the pairs (n - 1); null for one pair."),
        tables.or_null("std_images", pa.float64(), "The same over the images, each with the mean of its pairs."),
        tables.column("mean_units", pa.float64(), "Mean over the pairs of the number of such units."),
        tables.column(
            "delta",
            pa.float64(),
            "The sum of that number over all ordered pairs, as the formula has it; the mean over repeats.",
        ),
        tables.column("changed", pa.float64(), "Share of units that a mask changes, mean over the images."),
        tables.or_null(
            "mean_of_changed",
            pa.float64(),
            "As mean, of the units that changed in at least one image of the pair; null if there is none.",
        ),
        tables.column("mask_px", pa.int32(), "Side of the masks in input pixels."),
        tables.column("fill", pa.string(), "What the masks show."),
    ],
)

PAIRS = tables.schema(
    "correspondence_pairs",
    row="two images under one mask at a layer",
    file="",
    key=("layer", "part", "repeat", "key", "other_key"),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.LAYER,
        PART,
        REPEAT,
        tables.KEY,
        tables.column("other_key", pa.string(), "Key of the other image; the earlier one in the shards comes first."),
        UNITS,
        tables.column(
            "differing",
            pa.int64(),
            "Units whose change has another sign (-1, 0 or 1) in the other image: the Hamming distance.",
        ),
        tables.column("share", pa.float64(), "The same, divided by the units."),
        tables.column("changed", pa.int64(), "Units that changed in at least one of the two images."),
    ],
)

_PLACES = pa.list_(pa.int32())

IMAGES = tables.schema(
    "correspondence_images",
    row="an image and its masks",
    file="",
    key=("key",),
    columns=[
        tables.MODEL_ID,
        tables.DATA_ID,
        tables.KEY,
        tables.SHARD,
        tables.LABEL,
        tables.LABEL_NAME,
        tables.column("parts", pa.list_(pa.string()), "Part of each mask: the landmarks, then the random ones."),
        tables.column("mask_tops", _PLACES, "First row of each mask in input pixels."),
        tables.column("mask_lefts", _PLACES, "First column of each mask in input pixels."),
        tables.column("mask_px", pa.int32(), "Side of the masks in input pixels."),
        tables.column("image_png", pa.binary(), "PNG of the network's input pixels, RGB."),
    ],
)

IMAGE = ("key", "shard", "label", "parts", "mask_tops", "mask_lefts", "image_png")

PART_SCHEMA = pa.schema(
    [
        pa.field("group", pa.string()),  # what is compared: layer and mask; empty for the row that is the image's own
        pa.field("key", pa.string()),
        pa.field("signs", pa.binary()),  # int8 [units]
        *(IMAGES.field(name).with_nullable(True) for name in IMAGE if name != "key"),
    ]
)


def resolve(context: Context) -> Config:
    """The layers and the mask by name and number. Raises: RunError where there is no layer to choose."""
    config: Config = context.config
    classes = bool(context.model.classes)
    try:
        layers = config.layers or (
            last_hidden_convolution(context.graph, classes),
            last_hidden_layer(context.graph, classes),
        )
    except ValueError as error:
        raise RunError(str(error)) from None
    default = round(MASK_SHARE * context.model.preprocessing.crop_px)
    return replace(config, layers=tuple(dict.fromkeys(layers)), mask_px=config.mask_px or default)


def slices(context: Context) -> list[str]:
    """One. Raises: UnknownLayer; RunError where fewer than two images have all parts, or given ones do not."""
    for layer in context.config.layers:
        context.graph.activation_of(layer)
    samples(context, [SLICE])
    return [SLICE]


def samples(context: Context, slices: list[str]) -> pa.Table:
    """The chosen images: shards are read, in order, until there are enough. What cannot be read is left to the sweep.

    Raises: RunError where there are fewer than two, or where one that was asked for by key cannot be compared.
    """
    config: Config = context.config
    rows = with_keys(context, config.keys) if config.keys else context.index.split(context.split)
    chosen, reasons = [], []
    for place, sample in enumerate(context.index.read(rows)):
        reason = None if isinstance(sample, Skipped) else _unsuitable(context, sample)
        if reason is None:
            chosen.append(place)
        else:
            reasons.append(f"{sample.key!r}: {reason}")
        if len(chosen) == config.first and not config.keys:
            break
    if len(chosen) < 2 or (config.keys and reasons):
        raise RunError(
            f"correspondence compares at least two images that each have {', '.join(config.parts)} once in the "
            f'"landmarks" of their json; {len(chosen)} of {rows.num_rows} can be compared. Not so: '
            + "; ".join(reasons[:5] + ["..."] * (len(reasons) > 5))
        )
    return rows.take(pa.array(chosen, pa.int64()))


def _unsuitable(context: Context, sample: Sample) -> str | None:
    """Why an image cannot be compared; None where it can, or cannot be read."""
    config: Config = context.config
    try:
        described = json.loads(sample.members.get("json", b"{}"))
        if config.where is not None and described.get(config.where) is not True:
            return f"{config.where} is not true"
        counts = {part: len(described.get("landmarks", {}).get(part, [])) for part in config.parts}
        if others := [f"{part} {count} times" for part, count in counts.items() if count != 1]:
            return f"it has {', '.join(others)}"
        size = context.model.preprocessing.resize_px, context.model.preprocessing.crop_px
        _masks(context, sample, images.input_pixels(sample.image, *size)[1])
    except images.BadImage:
        return None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        return str(error)
    return None


def _masks(context: Context, sample: Sample, crop: images.Crop) -> list[Place]:
    """The masks of one image, in the order of Config.masks, from its landmarks and boxes in original pixels.

    Raises: ValueError where a mask leaves the input, or there is no room; more where the json is not as expected.
    """
    config: Config = context.config
    assert config.mask_px is not None
    described = json.loads(sample.members["json"])
    named = []
    for part in config.parts:
        x, y = described["landmarks"][part][0]
        row, col = crop.from_original(y, x)[:2]
        named.append(centred(row, col, config.mask_px))
        if not lies_inside(named[-1], config.mask_px, crop.size_px):
            raise ValueError(f"the mask of {part} leaves the network's input")
    seed = hashlib.sha256(json.dumps([config.seed, sample.key]).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    boxes = _boxes(sample, crop) if config.random_in == "box" else None
    return named + random_places(named, config.mask_px, crop.size_px, config.random, rng, boxes)


def _boxes(sample: Sample, crop: images.Crop) -> list[Box]:
    """The boxes of the sample's json in input pixels."""
    edges = boxes_of(sample).tolist()
    return [crop.from_original(top, left, bottom - top, right - left) for top, left, bottom, right in edges]


def map_batch(context: Context, state: None, batch: Batch) -> pa.Table:
    """One image: the signs of the changes by every mask at every layer, and where the masks are."""
    (picture,) = batch.pictures
    config: Config = context.config
    places = _masks(context, picture.sample, picture.crop)
    copies = masked(batch.x[0], filled(context, batch), places, config.mask_px or 0)
    try:
        found = features(context.graph, torch.cat([batch.x, copies]), config.layers)
    except NotFinite as error:
        raise NotFinite(0, error.feature_map) from None  # the copies are of one image
    rows = []
    for layer, vectors in found.items():
        signs = change_signs(vectors[0], vectors[1:], config.least).cpu().numpy()
        rows += [(_group(layer, *mask), some.tobytes()) for mask, some in zip(config.masks(), signs, strict=True)]
    return _part_rows(context, picture, places, rows)


def _group(layer: str, part: str, repeat: int) -> str:
    return json.dumps([layer, part, repeat])


def _part_rows(context: Context, picture: Picture, places: list[Place], signs: list[tuple[str, bytes]]) -> pa.Table:
    sample = picture.sample
    own = {
        "shard": sample.shard,
        "label": sample.label,
        "parts": [part for part, _ in context.config.masks()],
        "mask_tops": [top for top, _ in places],
        "mask_lefts": [left for _, left in places],
        "image_png": png(picture.pixels),
    }
    columns: dict[str, Any] = {
        "group": ["", *(group for group, _ in signs)],
        "key": [sample.key] * (1 + len(signs)),
        "signs": [None, *(some for _, some in signs)],
        **{name: [value] + [None] * len(signs) for name, value in own.items()},
    }
    return tables.conform(columns, PART_SCHEMA)


def reduce_part(context: Context, results: list[pa.Table]) -> pa.Table:
    """The rows of a part by what is compared, then in index order: the fold reads one group at a time."""
    rows = pa.concat_tables([PART_SCHEMA.empty_table(), *results])
    groups = rows["group"].to_pylist()
    return rows.take(pa.array(sorted(range(rows.num_rows), key=groups.__getitem__), pa.int64()))


@dataclass(frozen=True, eq=False)
class Compared:
    """All pairs of images under one mask at one layer."""

    layer: str
    part: str
    repeat: int
    keys: list[str]
    units: int
    differing: np.ndarray
    """int64 [N, N], Hamming distances."""
    changed: np.ndarray
    """int64 [N, N], units that changed in at least one of two images; of one image on the diagonal."""


def _compared(context: Context, parts: list[Location]) -> Iterator[Compared]:
    for layer, (part, repeat) in itertools.product(context.config.layers, context.config.masks()):
        group = _group(layer, part, repeat)
        rows = pa.concat_tables([tables.read_equal(file, ["key", "signs"], "group", group) for file in parts])
        signs = np.stack([np.frombuffer(some, np.int8) for some in rows["signs"].to_pylist()])
        differing, changed = sign_distances(torch.from_numpy(signs))
        yield Compared(layer, part, repeat, rows["key"].to_pylist(), signs.shape[1], differing.numpy(), changed.numpy())


def fold(context: Context, parts: list[Location], slices: list[str]) -> Iterator[Finished]:
    """One file of each table."""
    yield Finished("correspondence_images", SLICE, IMAGES, (_images(context, part) for part in parts))
    pairs = (_pairs(context, compared) for compared in _compared(context, parts))
    yield Finished("correspondence_pairs", SLICE, PAIRS, pairs)
    by_part = itertools.groupby(_compared(context, parts), key=lambda compared: (compared.layer, compared.part))
    yield Finished(
        "correspondence", SLICE, CORRESPONDENCE, (_summary(context, list(repeats)) for _, repeats in by_part)
    )


def _images(context: Context, part: Location) -> pa.Table:
    rows = tables.read_equal(part, list(IMAGE), "group", "")
    count = rows.num_rows
    columns = {
        **{name: [value] * count for name, value in context.identity.items()},
        **{name: rows[name] for name in IMAGE},
        "label_name": [context.index.label_name(label) for label in rows["label"].to_pylist()],
        "mask_px": [context.config.mask_px] * count,
    }
    return tables.conform(columns, IMAGES)


def _pairs(context: Context, compared: Compared) -> pa.Table:
    first, second = np.triu_indices(len(compared.keys), k=1)
    differing = compared.differing[first, second]
    about = {
        **context.identity,
        "layer": compared.layer,
        "part": compared.part,
        "repeat": compared.repeat,
        "units": compared.units,
    }
    columns: dict[str, Any] = {
        **{name: [value] * len(first) for name, value in about.items()},
        "key": [compared.keys[i] for i in first],
        "other_key": [compared.keys[i] for i in second],
        "differing": differing,
        "share": differing / compared.units,
        "changed": compared.changed[first, second],
    }
    return tables.conform(columns, PAIRS)


def _summary(context: Context, repeats: list[Compared]) -> pa.Table:
    """One row: a layer and part."""
    one, count = repeats[0], len(repeats[0].keys)
    if count < 2:
        raise RunError(f"{count} of the chosen images could be read, and pairs need two; see results/skipped")
    upper = np.triu_indices(count, k=1)
    differing = np.concatenate([compared.differing[upper] for compared in repeats])
    changed = np.concatenate([compared.changed[upper] for compared in repeats])
    of_images = np.mean([compared.differing.sum(1) / (count - 1) for compared in repeats], axis=0) / one.units
    touched = changed > 0
    row = {
        **context.identity,
        "layer": one.layer,
        "part": one.part,
        "images": count,
        "pairs": len(differing),
        "units": one.units,
        "mean": differing.mean() / one.units,
        "std_pairs": float(np.std(differing / one.units, ddof=1)) if len(differing) > 1 else None,
        "std_images": float(np.std(of_images, ddof=1)) if count > 2 else None,
        "mean_units": differing.mean(),
        "delta": 2 * differing.sum() / len(repeats),
        "changed": np.mean([np.diag(compared.changed) for compared in repeats]) / one.units,
        "mean_of_changed": float((differing[touched] / changed[touched]).mean()) if touched.any() else None,
        "mask_px": context.config.mask_px,
        "fill": context.config.fill,
    }
    return tables.conform({name: [value] for name, value in row.items()}, CORRESPONDENCE)


def expected_rows(context: Context, slice_: str, skipped: set[str]) -> int:
    """A row for each layer and part."""
    return len(context.config.layers) * len({part for part, _ in context.config.masks()})


def report(run: Run, name: str | None) -> Iterator[str]:
    """Layer by layer, the paper's measure of each part."""
    table = named("correspondence", name)
    rows = tables.read(run.slice(table, SLICE)).to_pandas()
    for layer, parts in rows.groupby("layer", sort=False):
        means = ", ".join(f"{part} {mean:.3f}" for part, mean in zip(parts.part, parts["mean"], strict=True))
        yield f"{table}: {layer}: share of sign changes that differ between two images (lower: more alike): {means}"


ANALYSIS = Analysis(
    table="correspondence",
    tables=("correspondence_images", "correspondence_pairs", "correspondence"),
    module=__name__,
    part_schema=lambda config: PART_SCHEMA,
    resolve=resolve,
    selects=(),
    slices=slices,
    samples=samples,
    map_batch=map_batch,
    reduce_part=reduce_part,
    fold=fold,
    forwards=lambda context: 1 + len(context.config.masks()),
    expected_rows=expected_rows,
    report=report,
)
