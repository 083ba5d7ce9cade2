"""Time and size of the atlas of a whole ZFNet: 1,376 feature maps with nine projections, patches and pictures each.

python -m benchmarks.atlas [--keep FOLDER] [--groups]

The run is synthetic, its tables are written by the real writers at the paper's receptive fields: 12,384 projections as
float32 and as many patches. The build is `jobs/atlas.py` in this process. Pages are opened from disk in headless
Chromium, where there is one, with nothing cached; bytes are those of all files that the browser asked for until it
came to rest.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline import tables
from pipeline.analyses import deconv, groups, pictures, top9
from pipeline.atlas import Options, build
from pipeline.projections import semantics_columns, stored
from pipeline.runs import Run
from zfnet import models
from zfnet.deconv import Semantics
from zfnet.images import Preprocessing
from zfnet.receptive import receptive_field
from zfnet.tracing import trace

SIDE, RANKS, POOL = 224, 9, 48
CHROMIUM = "/usr/bin/chromium"
IDENTITY = {"model_id": "synthetic", "data_id": "synthetic"}
GROUPS = {"top": None, "q0.75": 0.75, "q0.5": 0.5, "q0.25": 0.25, "bottom": None}


def blobs(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3]: a picture with the detail of a photograph, so that files have its size."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(smooth + rng.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8)


def write_run(folder: Path, with_groups: bool) -> Run:
    """The synthetic run."""
    run = Run.at(str(folder / "zfnet"))
    preprocessing = Preprocessing(resize_px=256, crop_px=SIDE)
    names = tuple(f"class {number}" for number in range(1000))
    run.save_model(
        torch.nn.Linear(1, 1),
        architecture="zfnet",
        classes=names,
        preprocessing=preprocessing,
        about={"synthetic": True},
    )
    with torch.device("meta"):
        network = models.build("zfnet")
    graph = trace(network.eval(), (3, SIDE, SIDE))
    rng = np.random.default_rng(0)
    images = [blobs(rng, SIDE) for _ in range(POOL)]
    for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        maps, rows, cols = graph[graph.activation_of(layer)].shape
        write_layer(run, layer, maps, (rows, cols), receptive_field(graph, layer), images, rng, with_groups)
    return run


def write_layer(
    run: Run, layer: str, maps: int, size: tuple[int, int], field: Any, images: list[Any], rng: Any, with_groups: bool
) -> None:
    count = maps * RANKS
    row, col = rng.integers(0, size[0], count), rng.integers(0, size[1], count)
    top, left, height, width = (np.broadcast_to(side, count) for side in field.box(row, col))
    keys = [f"val-{number:06d}" for number in rng.integers(0, 50_000, count)]
    label = rng.integers(0, 1000, count)
    cells = {
        **{name: [value] * count for name, value in IDENTITY.items()},
        **{"layer": [layer] * count, "feature_map": np.repeat(np.arange(maps), RANKS)},
        **{
            "rank": np.tile(np.arange(1, RANKS + 1), maps),
            "activation": -np.sort(-rng.gamma(2, 10, (maps, RANKS))).ravel(),
        },
        **{
            "key": keys,
            "shard": ["val-000000.tar"] * count,
            "label": label,
            "label_name": [f"class {n}" for n in label],
        },
        **{"row": row, "col": col, "top": top, "left": left, "height": height, "width": width},
    }
    statistics: dict[str, Any] = {name: np.full(maps, 5.0) for name in top9.FEATURE_MAPS.names}
    statistics |= {**{name: [value] * maps for name, value in IDENTITY.items()}, "layer": [layer] * maps}
    statistics |= {"feature_map": np.arange(maps), "images": [50_000] * maps, "dead": [False] * maps}
    statistics |= {"maximum": np.asarray(cells["activation"])[::RANKS], "active_share": rng.random(maps)}
    statistics |= {
        "histogram": [rng.integers(0, 500, 120)] * maps,
        "histogram_edges": [np.geomspace(0.01, 90, 121)] * maps,
    }
    finish(run, "feature_maps", layer, top9.FEATURE_MAPS, [tables.conform(statistics, top9.FEATURE_MAPS)])
    finish(run, "top9", layer, top9.TOP9, [tables.conform(cells, top9.TOP9)])
    finish(run, "deconv", layer, deconv.schema(deconv.Config()), deconv_rows(cells, images, rng))
    kept = [("pictures", keys)]
    if with_groups:
        grouped = {name: np.tile(np.asarray(values), len(GROUPS)) for name, values in cells.items()}
        grouped |= {"class": [None] * count * len(GROUPS), "group": np.repeat(list(GROUPS), count)}
        grouped |= {"quantile": [share for share in GROUPS.values() for _ in range(count)]}
        finish(run, "groups", layer, groups.SCHEMA, [tables.conform(grouped, groups.SCHEMA)])
        kept.append(("pictures-groups", keys))
    for table, names in kept:
        finish(run, table, layer, pictures.PICTURES, [picture_rows(layer, list(dict.fromkeys(names)), images)])


def deconv_rows(cells: dict[str, Any], images: list[Any], rng: Any, together: int = 16 * RANKS) -> Iterator[pa.Table]:
    """Projections and patches, cut to the image; each from one of a few images."""
    noise = rng.normal(size=(SIDE, SIDE, 3)).astype(np.float32)
    patches: dict[tuple[int, ...], bytes] = {}
    for first in range(0, len(cells["rank"]), together):
        some = {name: values[first : first + together] for name, values in cells.items()}
        projections, encoded = [], []
        for i in range(len(some["rank"])):
            top, left = max(int(some["top"][i]), 0), max(int(some["left"][i]), 0)
            bottom = min(int(some["top"][i] + some["height"][i]), SIDE)
            right = min(int(some["left"][i] + some["width"][i]), SIDE)
            projections.append(noise[top:bottom, left:right] * np.float32(some["activation"][i]))
            place = (top // 8, left // 8, bottom - top, right - left)
            if place not in patches:
                image = images[(first + i) % len(images)]
                patches[place] = deconv.png(image[top:bottom, left:right])
            encoded.append(patches[place])
        rows = len(projections)
        yield tables.conform(
            {
                **some,
                **stored(projections, "float32"),
                "patch_png": encoded,
                **{f"box_{side}": [1.0] * rows for side in ("top", "left", "height", "width")},
                **semantics_columns(Semantics(), rows),
            },
            deconv.schema(deconv.Config()),
        )


def picture_rows(layer: str, keys: list[str], images: list[Any]) -> pa.Table:
    """A small picture for each key."""
    jpegs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).resize((128, 128)).save(buffer, format="JPEG", quality=85)
        jpegs.append(buffer.getvalue())
    count = len(keys)
    columns: dict[str, Any] = {name: [1.0] * count for name in pictures.PICTURES.names}
    columns |= {**{name: [value] * count for name, value in IDENTITY.items()}, "slice": [layer] * count, "key": keys}
    columns |= {"shard": ["val-000000.tar"] * count, "label": [0] * count, "label_name": ["class 0"] * count}
    columns |= {"picture_jpeg": [jpegs[i % len(jpegs)] for i in range(count)], "picture_px": [128] * count}
    return tables.conform(columns | {"input_px": [SIDE] * count}, pictures.PICTURES)


def finish(run: Run, table: str, layer: str, schema: pa.Schema, pieces: Any) -> None:
    rows = tables.write_stream(iter(pieces), schema, run.slice(table, layer))
    entry = {"rows": rows, "fingerprint": IDENTITY, "samples": 50_000, "skipped": {}, "seconds": 1.0}
    run.finish(table, layer, entry, run.location / "staging")


def opened(pages: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Seconds until a page has loaded, and the bytes it took, in a new browser context each."""
    if not Path(CHROMIUM).exists():
        return {}
    from playwright.sync_api import sync_playwright

    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        browser.new_page().goto("about:blank")
        for name, path in pages.items():
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            files: set[str] = set()
            page.on("request", lambda request, files=files: files.add(unquote(urlsplit(request.url).path)))
            started = time.perf_counter()
            page.goto(path.as_uri(), wait_until="load")
            seconds = time.perf_counter() - started
            page.wait_for_load_state("networkidle")
            asked = [Path(file).stat().st_size for file in files if Path(file).is_file()]
            found[name] = {"seconds": round(seconds, 2), "kB": round(sum(asked) / 1000), "files": len(asked)}
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="write the run here and leave it; default a temporary folder")
    parser.add_argument("--groups", action="store_true", help="five groups of nine images for each map, too")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = time.perf_counter()
        run = write_run(folder, options.groups)
        print(f"run written in {time.perf_counter() - started:.1f} s", flush=True)
        started, used = time.perf_counter(), time.process_time()
        index = build(run, Options()).local
        seconds, used = time.perf_counter() - started, time.process_time() - used
        files = [path for path in index.parent.rglob("*") if path.is_file()]
        pages = {"index": index, "maps": index.parent / "maps.html", "conv3": index.parent / "layers" / "conv3.html"}
        pages |= {"a map": index.parent / "maps" / "conv5" / "7.html"}
        shown = opened(pages)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        print(f"atlas built in {seconds:.1f} s, {used:.1f} s of computing, on {os.cpu_count()} cores, {peak:.0f} MiB")
        print(f"{len(files)} files, {megabytes:.0f} MB")
        for name, measured in shown.items():
            print(f"{name:8s} {measured}")
        print(json.dumps({"ratio": 60 / seconds, "seconds": seconds, "files": len(files), "pages": shown}))


if __name__ == "__main__":
    main()
