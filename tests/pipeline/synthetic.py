"""A run as the jobs would have written it, small and synthetic: real schemas, real writers, hostile strings."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline import metrics, tables
from pipeline.analyses import (
    deconv,
    dense_maps,
    detection,
    duplicates,
    evaluation,
    groups,
    object_occlusion,
    occlusion,
    pictures,
    top9,
    units,
)
from pipeline.projections import semantics_columns, stored
from pipeline.runs import Run
from zfnet.deconv import Semantics
from zfnet.images import Preprocessing

HOSTILE = '<script>alert("x")</script>\n\'&"</script><!-- \u202e\u05e9\u05dc\u05d5\u05dd 🦊 {{ 7919*7927 }} ../../etc'
CLASSES = ("cat", HOSTILE, "dog", 'a"onerror=alert(1) x="')
SIDE = 32
LAYERS = ("conv1", "features.10", 'Odd <b>&"layer#1?')
IDENTITY = {"model_id": "m0", "data_id": "d0"}


def make_run(folder: Path, *, values: str = "float32", without: tuple[str, ...] = (), maps: int = 4) -> Run:
    """A run with every table but those named in `without`, and so many maps in each layer."""
    run = Run.at(str(folder / "run"))
    run.save_model(
        torch.nn.Linear(2, 2),
        architecture=HOSTILE,
        classes=CLASSES,
        preprocessing=Preprocessing(resize_px=SIDE, crop_px=SIDE),
        about={"seed": 7, "data": HOSTILE},
    )
    if "metrics" not in without:
        for epoch in (1, 2, 3):
            metrics.write(run, dict.fromkeys(metrics.METRICS.names, epoch / 4) | {"epoch": epoch, "skipped": 0})
    for layer in LAYERS:
        write_layer(run, layer, values, without, maps)
    if "occlusion" not in without:
        write_occlusion(run)
    if "others" not in without:
        write_others(run)
        for epoch in (1, 5):
            write_evolution(run, epoch)
    if "skipped" not in without:
        row = {name: [HOSTILE] for name in tables.SKIPPED.names}
        tables.write(tables.conform(row, tables.SKIPPED), run.location / "results" / "skipped" / "top9.parquet")
    return run


def entry(rows: int, data_id: str = IDENTITY["data_id"]) -> dict[str, Any]:
    return {
        "rows": rows,
        "fingerprint": {**IDENTITY, "data_id": data_id},
        "samples": 40,
        "skipped": {"bad_image": 1},
        "seconds": 1.0,
    }


def finish(run: Run, table: str, slice_: str, rows: Any, **of: str) -> None:
    tables.write(rows, run.slice(table, slice_))
    run.finish(table, slice_, entry(rows.num_rows, **of), run.location / "staging")


def write_layer(run: Run, layer: str, values: str, without: tuple[str, ...], maps: int = 4, side: int = 12) -> None:
    """Map 0 has nine images, map 1 three, map 2 is dead, map 3 has a projection that is zero; again from 4 on."""
    counts = list(itertools.islice(itertools.cycle([9, 3, 0, 1]), maps))
    number = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(1, count + 1) for count in counts])
    rows = len(rank)
    box = {"top": rank - 5, "left": np.where(rank > 5, SIDE - 6, 4), "height": [side] * rows, "width": [side] * rows}
    shared = {
        **{name: [value] * rows for name, value in IDENTITY.items()},
        "layer": [layer] * rows,
        "feature_map": number,
        "rank": rank,
        "activation": 10.0 / rank,
        "key": [f"{HOSTILE}-{r}" for r in rank],
        "shard": ["val-000000.tar"] * rows,
        "label": [None if r == 2 else int(r) % 4 for r in rank],
        "label_name": [None if r == 2 else CLASSES[r % 4] for r in rank],
        "row": rank,
        "col": rank,
        **box,
    }
    statistics = {name: [1.0] * len(counts) for name in top9.FEATURE_MAPS.names if name[0] == "q"} | {
        **{name: [value] * len(counts) for name, value in IDENTITY.items()},
        "layer": [layer] * len(counts),
        "feature_map": np.arange(len(counts)),
        "images": [40] * len(counts),
        "mean": [0.5] * len(counts),
        "maximum": [10.0 if count else 0.0 for count in counts],
        "active_share": [count / 40 for count in counts],
        "active_cells_share": [0.1] * len(counts),
        "dead": [count == 0 for count in counts],
        "histogram": [[1, 2] if count else [] for count in counts],
        "histogram_edges": [[0.5, 1.0, 20.0] if count else [] for count in counts],
    }
    if "feature_maps" not in without:
        finish(run, "feature_maps", layer, tables.conform(statistics, top9.FEATURE_MAPS))
    if "top9" not in without:
        finish(run, "top9", layer, tables.conform(shared, top9.TOP9))
    if "deconv" not in without:
        finish(run, "deconv", layer, deconv_rows(shared, values))
    if "others" not in without:
        write_around(run, layer, shared)


def deconv_rows(shared: dict[str, Any], values: str, scale: float = 4.0) -> Any:
    """Projections: +1 in the upper half and -1 in the lower; of map 3 zero. Patches: red."""
    projections, patches = [], []
    for index, number in enumerate(shared["feature_map"]):
        top, left, height, width = (int(shared[name][index]) for name in ("top", "left", "height", "width"))
        shape = (min(top + height, SIDE) - max(top, 0), min(left + width, SIDE) - max(left, 0), 3)
        pixels = np.zeros(shape, dtype=np.float32)
        if number != 3:
            pixels[: shape[0] // 2], pixels[shape[0] // 2 :] = scale, -scale
        projections.append(pixels)
        patches.append(deconv.png(np.broadcast_to(np.uint8([200, 0, 0]), shape).copy()))
    rows = len(projections)
    columns = {
        **shared,
        **stored(projections, values),
        "patch_png": patches,
        **{f"box_{name}": [1.0] * rows for name in ("top", "left", "height", "width")},
        **semantics_columns(Semantics(), rows),
    }
    return tables.conform(columns, deconv.schema(deconv.Config(values=values)))  # type: ignore[arg-type]


def write_occlusion(run: Run) -> None:
    """Two images: one of a class with a hostile name, one without a label."""
    grid, stride, square = 5, 6, 8
    probability = np.linspace(0.1, 0.9, grid * grid, dtype=np.float32)
    same = {
        **IDENTITY,
        "shard": "val-000000.tar",
        "target_class": 1,
        "clean_class": 1,
        "clean_class_name": CLASSES[1],
        "clean_class_probability": 0.9,
        "clean_probability": 0.9,
        "grid_rows": grid,
        "grid_cols": grid,
        "occluder_px": square,
        "occluder_width_px": square,
        "stride_px": stride,
        "fill": "124",
        "exact": True,
        "dense_from": "pool5",
        "layer": "conv1",
        "feature_map": 0,
        "activation_map": np.arange(grid * grid, dtype=np.float32),
        "probability_map": probability,
        "class_map": np.arange(grid * grid, dtype=np.int32) % 4,
        "clean_top5_classes": [1, 0, 2, 3],
        "clean_top5_probabilities": [0.9, 0.05, 0.03, 0.02],
        "lowest_top5_classes": [0, 2, 1, 3],
        "lowest_top5_probabilities": [0.6, 0.2, 0.1, 0.1],
        "image_png": deconv.png(np.full((SIDE, SIDE, 3), 60, dtype=np.uint8)),
        "activation": 5.0,
        **{"row": 1, "col": 2, "top": -2, "left": 3, "height": 12, "width": 12},
        **{name: value[0] for name, value in semantics_columns(Semantics(), 1).items()},
    }
    rows = [{**same, "key": HOSTILE, "label": 1, "label_name": CLASSES[1]}]
    rows.append({**same, "key": "plain", "label": None, "label_name": None, "class_map": np.full(25, 99)})
    projected = stored([np.ones((10, 12, 3), dtype=np.float32)] * 2, "float32")
    columns = {name: [row[name] for row in rows] for name in rows[0]} | projected
    finish(run, "occlusion", "images", tables.conform(columns, occlusion.OCCLUSION))


def write_around(run: Run, layer: str, shared: dict[str, Any]) -> None:
    """What stands around the cells of a layer: groups, whole pictures of both, maps that answer alike, units."""
    cells = {name: shared[name] for name in [*IDENTITY, *(field.name for field in tables.CELL)]}
    rows = len(shared["rank"])
    grouped = {name: np.tile(values, 2) for name, values in cells.items()}
    grouped |= {"class": [None] * 2 * rows, "group": ["q0.5"] * rows + ["bottom"] * rows}
    grouped |= {"quantile": [0.5] * rows + [None] * rows, "label": list(shared["label"]) * 2}
    grouped |= {"label_name": list(shared["label_name"]) * 2}
    finish(run, "groups", layer, tables.conform(grouped, groups.SCHEMA))
    for table in ("pictures", "pictures-groups"):
        finish(run, table, layer, picture_rows(layer, dict.fromkeys(shared["key"])))
    pair = {**first(IDENTITY), "layer": [layer], "feature_map": [0], "other_map": [1], "correlation": [0.97]}
    finish(run, "duplicates", layer, tables.conform({**pair, "duplicate": [True], "images": [40]}, duplicates.SCHEMA))
    finish(
        run,
        "units",
        layer,
        tables.conform(filled(units.SCHEMA, 4, layer=[layer] * 4, feature_map=range(4)), units.SCHEMA),
    )


def write_evolution(run: Run, epoch: int) -> None:
    """Of every layer the strongest cell of map 0, and at epoch 5 of map 1, too; sorted, a row group a layer."""
    rows = []
    for layer in LAYERS:
        count = 1 if epoch == 1 else 2
        cells = {name: [value] * count for name, value in IDENTITY.items()}
        cells |= {"layer": [layer] * count, "feature_map": np.arange(count), "rank": [1] * count}
        cells |= {"activation": [float(epoch)] * count, "key": [HOSTILE] * count, "shard": ["train-000000.tar"] * count}
        cells |= {"label": [1] * count, "label_name": [CLASSES[1]] * count, "row": [0] * count, "col": [0] * count}
        cells |= {"top": [0] * count, "left": [0] * count, "height": [12] * count, "width": [12] * count}
        projected = deconv_rows(cells, "float32", scale=float(epoch))
        epochs = pa.array([epoch] * count, pa.int32())
        rows.append(
            projected.append_column("epoch", epochs).append_column("image_changed", pa.array([epoch > 1] * count))
        )
    name = f"epoch-{epoch:04d}"
    tables.write_stream(iter(rows), rows[0].schema, run.slice("evolution", name))
    run.finish("evolution", name, entry(sum(len(some) for some in rows)), run.location / "staging")


def picture_rows(slice_: str, keys: Any, **further: Any) -> pa.Table:
    """Whole pictures: blue, with a white dot in the middle."""
    pixels = np.full((SIDE, SIDE, 3), (0, 0, 200), dtype=np.uint8)
    pixels[SIDE // 2, SIDE // 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    given = {"key": list(keys), "slice": [slice_] * len(keys), "picture_jpeg": [buffer.getvalue()] * len(keys)}
    given |= {"picture_px": [SIDE] * len(keys), "input_px": [SIDE] * len(keys), **further}
    return tables.conform(filled(pictures.PICTURES, len(keys), **given), pictures.PICTURES)


def write_others(run: Run) -> None:
    """Tables of the whole run: predictions, errors, confusion, boxes, and one that no page knows."""
    key = {"key": [HOSTILE, "plain"], "label": [1, 0], "label_name": [CLASSES[1], CLASSES[0]]}
    told = {"predicted_class": [1, 2], "predicted_name": [CLASSES[1], CLASSES[2]]}
    finish(
        run,
        "predictions",
        "val",
        tables.conform(filled(evaluation.PREDICTIONS, 2, **key, **told), evaluation.PREDICTIONS),
    )
    named = {"label": [0, 0, 1], "label_name": [CLASSES[0], CLASSES[0], CLASSES[1]], "predicted_class": [0, 1, 1]}
    named |= {"predicted_name": [CLASSES[0], CLASSES[1], CLASSES[1]], "images": [9, 1, 4]}
    finish(run, "confusion", "val", tables.conform(filled(evaluation.CONFUSION, 3, **named), evaluation.CONFUSION))
    errors = {"split": ["val"], "views": ["centre"], "images": [40], "top1_error": [0.25], "top5_error": [0.125]}
    finish(run, "evaluation", "val", tables.conform(filled(evaluation.EVALUATION, 1, **errors), evaluation.EVALUATION))
    box = {"object_top": [4, None], "object_left": [6, None], "object_height": [10, None], "object_width": [12, None]}
    hidden = filled(object_occlusion.SCHEMA, 2, **key, **box)
    finish(run, "object_occlusion", "images", tables.conform(hidden, object_occlusion.SCHEMA))
    unknown = pa.table(
        {"key": ["plain"], "layer": ["conv1"], "feature_map": [0], HOSTILE: [HOSTILE], "list": [[1.5] * 9]}
    )
    finish(run, "unheard_of", "all", unknown)


def write_boxes(run: Run, keys: list[str], data_id: str = IDENTITY["data_id"]) -> None:
    """A true box in each image; in the first one a box on it that is right, and a weaker one of a confused class."""
    place = {"box_top": [10.0, 20.0], "box_left": [30.0, 40.0], "box_height": [20.0, 4.0], "box_width": [40.0, 4.0]}
    truths = {name: values[:1] * len(keys) for name, values in place.items()}
    truths |= {"key": keys, "fate": ["found", "missed"][: len(keys)], "class_name": [HOSTILE] * len(keys)}
    rows = filled(detection.OBJECTS, len(keys), **truths)
    finish(run, "detection_objects", "images", tables.conform(rows, detection.OBJECTS), data_id=data_id)
    found = place | {"key": keys[:1] * 2, "outcome": ["right", "confused_class"], "score": [4.0, 1.0]}
    rows = filled(detection.DETECTION, 2, **found)
    finish(run, "detection", "images", tables.conform(rows, detection.DETECTION), data_id=data_id)
    window = {
        f"window_{side}": [value]
        for side, value in zip(("top", "left", "height", "width"), (8, 16, 64, 64), strict=True)
    }
    window |= {name: values[:1] for name, values in place.items()} | {"key": keys[:1], "confidence": [0.75]}
    rows = filled(detection.WINDOWS, 1, **window)
    finish(run, "detection_windows", "images", tables.conform(rows, detection.WINDOWS), data_id=data_id)


def write_whole(run: Run, keys: list[str], height: int, width: int) -> None:
    """Small pictures of whole images of this size."""
    count = len(keys)
    place = {"box_top": [0] * count, "box_left": [0] * count, "box_height": [height] * count}
    rows = picture_rows("images", keys, **place, box_width=[width] * count, input_px=[None] * count)
    finish(run, "pictures-detection", "images", rows)


def write_detection(run: Run, keys: list[str]) -> None:
    """Boxes, and the pictures that they are drawn on."""
    write_boxes(run, keys)
    write_whole(run, keys, 80, 160)


def write_class_maps(run: Run) -> None:
    """Of the image "plain" at one scale: the maps of the strongest class, and of its own."""
    png = deconv.png(np.full((40, 60, 3), 60, dtype=np.uint8))
    rows = {"key": ["plain"] * 2, "class": [1, 2], "class_name": [HOSTILE, CLASSES[2]], "rank": [1, 9]}
    rows |= {"label_name": [CLASSES[2]] * 2, "map_height": [2] * 2, "map_width": [3] * 2, "window_px": [30] * 2}
    rows |= {"box_height": [60.0] * 2, "box_width": [90.0] * 2, "step_height": [20.0] * 2, "step_width": [45.0] * 2}
    rows |= {"probability_map": [[0.0, 0.5, 1.0, 0.25, 0.25, 0.25]] * 2, "image_png": [png, None]}
    finish(run, "dense_maps", "images", tables.conform(filled(dense_maps.SCHEMA, 2, **rows), dense_maps.SCHEMA))


def first(row: dict[str, Any]) -> dict[str, list[Any]]:
    """A row as columns."""
    return {name: [value] for name, value in row.items()}


def filled(schema: pa.Schema, rows: int, **given: Any) -> dict[str, Any]:
    """Columns of a schema: what is given, and something for the rest."""

    def some(kind: pa.DataType) -> Any:
        if pa.types.is_list(kind):
            return [some(kind.value_type)]
        if pa.types.is_boolean(kind):
            return False
        return HOSTILE if pa.types.is_string(kind) else b"" if pa.types.is_binary(kind) else 1

    return {field.name: given.get(field.name, [IDENTITY.get(field.name, some(field.type))] * rows) for field in schema}
