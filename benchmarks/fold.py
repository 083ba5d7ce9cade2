"""The fold of many small parts: seconds and memory of the process that folds, in one process and in Ray tasks.

python -m benchmarks.fold [--parts 10000] [--rounds 3]

ZFNet's conv1-5 (1,376 maps) with `maxima`, four images a part, their activations drawn at random: parts as jobs/top9.py
commits them, without the sweep. Both folds begin with copies of the same parts, alternating, each in a process of its
own; the clock runs over the fold alone, from its first look at a part to the last manifest. `mb_before` is what the
process holds then, ZFNet's weights among it (249), `mb` the most until the end; of that, at the end, `mb_code` are
pages of libraries and `mb_shared` of Ray's object store. A MB is 1,000,000 bytes. The tables of all folds must be the
same, bit for bit.
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import webdataset as wds
from PIL import Image

from benchmarks.parts import alone
from pipeline import sweep
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.indexing import index_shards
from zfnet.activations import Strongest

IMAGES = 4  # of a part
SHAPES = {"conv1": (96, 110), "conv2": (256, 26), "conv3": (384, 13), "conv4": (384, 13), "conv5": (256, 13)}
"""Maps of a layer, and the side of each."""
WORKERS = {"one process": Workers(num=0, cpus=1), "tasks": Workers(num=1, cpus=1, gpus=0)}


class Stopped(Exception):
    """All parts are there."""


def make_shards(folder: Path, images: int) -> None:
    """Images that nobody looks at, in shards of 1,000."""
    folder.mkdir()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, format="PNG")
    for shard in range(0, images, 1000):
        with wds.TarWriter(str(folder / f"val-{shard // 1000:06d}.tar")) as tar:
            for number in range(shard, min(shard + 1000, images)):
                tar.write({"__key__": f"{number:08d}", "png": buffer.getvalue()})
    index_shards([str(folder)], str(folder), classes=None, accept_damaged=False)


def found(numbers: np.ndarray) -> top9.Found:
    """What a batch of these images gives; the same for the same images."""
    rng = np.random.default_rng(numbers)
    layers = {}
    for layer, (maps, side) in SHAPES.items():
        value = rng.gamma(2.0, 1.0, size=(len(numbers), maps)).astype(np.float32)
        position = rng.integers(0, side * side, size=value.shape, dtype=np.int32)
        active = rng.integers(0, side * side, size=maps)
        layers[layer] = Strongest(value, position, rng.random(maps), active, (side, side))
    return top9.Found(layers, numbers)


def options(folder: Path, workers: Workers) -> Options:
    return Options(run=str(folder / "zfnet"), data=str(folder / "data"), workers=workers)


def commit(folder: Path, parts: int) -> None:
    """A run of which all parts are committed, and nothing is folded."""
    from benchmarks.sweep import write_run

    def committed(analysis: Any, given: Options, work: Any, todo: list[int]) -> None:
        for number in todo:
            numbers = np.asarray(work.parts[number]["number"], dtype=np.int64)
            work.commit(number, top9.reduce_part(work.context, [found(numbers)]), [], "cpu", 0.0)

    make_shards(folder / "data", IMAGES * parts)
    write_run(folder, "zfnet")
    stop = mock.patch.object(sweep, "_fold", side_effect=Stopped)
    with mock.patch.object(sweep, "_map", committed), stop, contextlib.suppress(Stopped), quiet():
        sweep.run(top9.ANALYSIS, options(folder, WORKERS["one process"]), top9.Config(part_size=IMAGES))


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


def folded(folder: Path, workers: Workers) -> dict[str, Any]:
    """The fold, in this process: seconds by the clock and by its processor, memory, and what the tables are."""
    took = {}
    fold = sweep._fold

    def clocked(*given: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is forgotten: that was loading weights
        took["mb_before"] = resident("VmHWM")
        clock, processor = time.perf_counter(), time.process_time()
        fold(*given)
        took.update(seconds=time.perf_counter() - clock, processor=time.process_time() - processor)
        took.update(mb=resident("VmHWM"), mb_shared=resident("RssShmem"), mb_code=resident("RssFile"))

    with mock.patch.object(sweep, "_fold", clocked), quiet():
        sweep.run(top9.ANALYSIS, options(folder, workers), top9.Config(part_size=IMAGES))
    return {**{name: round(value, 1) for name, value in took.items()}, "tables": tables(folder)}


def resident(name: str) -> float:
    """MB of this process's memory: VmHWM, the largest since it was last forgotten, or a part of it at this moment."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def tables(folder: Path) -> str:
    """A hash of all columns of all files."""
    digest = hashlib.sha256()
    for name in ("top9", "feature_maps", "maxima"):
        for file in sorted((folder / "zfnet" / "results" / name).glob("*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(100_000):
                digest.update(repr([len(column) for column in batch.columns]).encode())
                for column in batch.columns:
                    for buffer in column.buffers():
                        digest.update(b"" if buffer is None else buffer.to_pybytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in WORKERS}
    with tempfile.TemporaryDirectory() as name:
        begun = Path(name) / "begun"
        begun.mkdir()
        alone(commit, begun, given.parts)
        for _ in range(given.rounds):
            for way, workers in WORKERS.items():
                copy = Path(name) / "copy"
                shutil.copytree(begun, copy)
                taken[way].append(alone(folded, copy, workers))
                shutil.rmtree(copy)
                print(way, taken[way][-1], flush=True)
    assert len({one["tables"] for some in taken.values() for one in some}) == 1, "the tables differ"
    medians = {way: statistics.median(one["seconds"] for one in some) for way, some in taken.items()}
    print(json.dumps({"parts": given.parts, "median_seconds": medians}))


if __name__ == "__main__":
    main()
