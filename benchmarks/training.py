"""How near training comes to what its parts allow: `python -m benchmarks.training [--quick] [--batch N]`.

One Ray Train worker of one CPU reads JPEG shards, decodes and trains in one process. Decoding alone and a plain torch
loop fed from memory are measured before and after it in each round; the limit is 1 / (1/decode + 1/step). That is
done with nothing pinned, and again with all on one core, where Ray's own processes share it with the worker. The
pinned worker is also the baseline of two on simulated nodes of one CPU, each with its core; Ray's head and the driver
are on the first core in both. What two cores of this machine give at best is measured too: two plain loops of half
the batch that know nothing of each other, at once, over one of the whole batch. Medians over rounds.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from PIL import Image
from ray.cluster_utils import Cluster

from pipeline import metrics, train
from pipeline.cluster import Workers
from pipeline.indexing import index_shards
from pipeline.runs import Run
from pipeline.shards import Index
from pipeline.stream import Images, epoch_order, labelled
from zfnet import models, recipe
from zfnet.images import Preprocessing

VALIDATION = 64
NETWORK = "zfnet_small"


def make_shards(folder: Path, images: int) -> None:
    """JPEGs of 250 x 200 px in shards of 500, ten classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("val", VALIDATION)):
        for shard in range(0, count, 500):
            with wds.TarWriter(str(folder / f"{split}-{shard // 500:06d}.tar")) as tar:
                for number in range(shard, min(shard + 500, count)):
                    coarse = Image.fromarray(rng.integers(0, 256, size=(25, 20, 3), dtype=np.uint8))
                    buffer = io.BytesIO()
                    coarse.resize((250, 200), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
                    tar.write({"__key__": f"{split}{number:06d}", "jpg": buffer.getvalue(), "cls": str(number % 10)})
    index_shards([str(p) for p in sorted(folder.glob("*.tar"))], str(folder), classes=None, accept_damaged=False)


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """This process and what it starts inside the block run on one core; None: on any."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def nodes_on(cores: Sequence[int | None]) -> Iterator[str]:
    """A cluster with a node of one CPU on each of these cores, its head on the first; its address."""
    ray_ = {"include_dashboard": False, "object_store_memory": 2**27}
    with pinned(cores[0]):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **ray_})
    try:
        for core in cores:
            with pinned(core):
                cluster.add_node(num_cpus=1, object_store_memory=2**27)
        yield cluster.address
    finally:
        cluster.shutdown()


def decode_alone(data: Path, batch: int) -> tuple[float, list[Any]]:
    """Images a second of reading and decoding one epoch, and its batches."""
    index = Index.load(str(data))
    rows, _ = labelled(index, "train", 10)
    network = models.build(NETWORK, classes=10)
    dataset = Images(index, rows, Preprocessing(resize_px=network.resize_px, crop_px=network.input_px), seed=0)
    shards = rows["shard"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = epoch_order(shards, 0, 1)
    started = time.perf_counter()
    batches = [
        dataset.__getitems__([(1, int(row)) for row in order[start : start + batch]])
        for start in range(0, len(order) - batch + 1, batch)
    ]
    return len(batches) * batch / (time.perf_counter() - started), batches


def steps_alone(batches: list[Any]) -> float:
    """Images a second of a plain torch loop over batches in memory, with the recipe's arithmetic."""
    network = models.build(NETWORK, classes=10).train()
    recipe.initialise(network, "he")
    preprocessing = Preprocessing(
        resize_px=network.resize_px,
        crop_px=network.input_px,
        mean=torch.full((3, network.resize_px, network.resize_px), 120.0),
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    started = time.perf_counter()
    for batch in batches:
        x = preprocessing.normalise(batch.pixels, batch.top, batch.left)
        loss = F.cross_entropy(network(x), batch.label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        recipe.renormalise_filters(network)
    return sum(len(batch.label) for batch in batches) / (time.perf_counter() - started)


def trained(data: Path, run: Path, batch: int, epochs: int, cores: Sequence[int | None]) -> dict[str, float]:
    """Train on nodes of one CPU, one for each core, its processes pinned to it, head and driver to the first."""
    with nodes_on(cores) as address:
        options = train.Options(
            run=str(run),
            data=str(data),
            architecture=NETWORK,
            epochs=epochs,
            batch=batch,
            decoders=0,
            address=address,
            workers=Workers(num=len(cores), cpus=1, gpus=0),
        )
        started = time.perf_counter()
        with pinned(cores[0]):
            train.run(options)
        wall = time.perf_counter() - started
    rows = metrics.read(Run.at(str(run))).to_pylist()
    return {
        "rate": statistics.median(row["images_per_second"] for row in rows[1:]),
        "wait": statistics.median(row["data_wait_share"] for row in rows[1:]),
        "overhead": wall - sum(row["seconds"] for row in rows),
    }


def alone(data: Path, batch: int, core: int | None) -> tuple[float, float]:
    """Images a second of decoding alone, and of the plain loop from memory."""
    torch.set_num_threads(1)
    with pinned(core):
        decode, batches = decode_alone(data, batch)
        return decode, steps_alone(batches)


def limit(decode: float, step: float) -> float:
    """Images a second of both, one after the other."""
    return 1 / (1 / decode + 1 / step)


def at_once(data: Path, batch: int, cores: Sequence[int]) -> float:
    """Images a second, summed, of one process on each core, each with its share of the batch and on its own."""
    with multiprocessing.get_context("spawn").Pool(len(cores)) as pool:
        share = batch // len(cores)
        return sum(limit(*found) for found in pool.starmap(alone, [(data, share, core) for core in cores], chunksize=1))


def against_limit(data: Path, run: Path, batch: int, epochs: int, core: int | None) -> dict[str, float]:
    """One worker against the limit of its parts, which are measured before and after."""
    before = alone(data, batch, core)
    one = trained(data, run, batch, epochs, [core])
    decode, step = (statistics.mean(pair) for pair in zip(before, alone(data, batch, core), strict=True))
    return {
        "decode_images_per_second": decode,
        "step_images_per_second": step,
        "limit_images_per_second": limit(decode, step),
        "train_images_per_second": one["rate"],
        "share_of_limit": one["rate"] / limit(decode, step),
        "data_wait_share": one["wait"],
        "ray_overhead_seconds": one["overhead"],
    }


def measure(quick: bool, batch: int) -> dict[str, float]:
    """All figures: medians over the rounds."""
    rounds, images, epochs = (1, 1000, 5) if quick else (5, 2000, 7)
    cores = sorted(os.sched_getaffinity(0))[:2]
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        data.mkdir()
        make_shards(data, images)
        names = (Path(scratch) / f"run-{number}" for number in itertools.count())
        for _ in range(rounds):
            row = against_limit(data, next(names), batch, epochs, None)
            one = against_limit(data, next(names), batch, epochs, cores[0])
            row["pinned_share_of_limit"] = one["share_of_limit"]
            if len(cores) > 1:
                two = trained(data, next(names), batch, epochs, cores)
                row["two_plain_loops_over_one"] = at_once(data, batch, cores) / at_once(data, batch, cores[:1])
                row["two_workers_over_one"] = two["rate"] / one["train_images_per_second"]
            print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
            found.append(row)
    return {name: round(statistics.median(row[name] for row in found), 3) for name in found[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Training against the limit of its parts; two workers against one.")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--batch", type=int, default=64, help="images a step, over all workers")
    given = parser.parse_args()
    print(
        json.dumps({"benchmark": "training", **vars(given), "rounds": "medians", **measure(given.quick, given.batch)})
    )
