"""How much faster sweeps are on two simulated nodes of one CPU than on one.

python -m benchmarks.nodes [--quick]

Each node is a Ray node whose processes are pinned to a core of its own, the baseline's too; Ray's head and the driver
are on the first core in both. ZFNet at 224 px with random weights; 16 parts, so 8 a node. Clocked from the beginning of
the first part to the end of the last, so without start-up and fold. `ratio` is the smallest of the sweeps' ratios, each
a median of alternating rounds; what the machine's two cores give at best is measured beside them, with two plain
processes of forward passes that know nothing of each other.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.sweep import write_data, write_run
from benchmarks.training import nodes_on, pinned
from pipeline import sweep
from pipeline.analyses import deconv, occlusion, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.storage import Location
from zfnet import models

DATA = ("../shared/data/caltech101/val-000000.tar", "../shared/data/caltech101/val-000001.tar")
PARTS = 16
ARCHITECTURE = "zfnet"


def sweeps(images: int) -> dict[str, tuple[Any, Any]]:
    """The analyses with their configurations, cut into PARTS."""
    return {
        "top9": (top9.ANALYSIS, top9.Config(part_size=images // PARTS)),
        "deconv": (deconv.ANALYSIS, deconv.Config(layers=("conv3", "conv4"), part_size=images // PARTS)),
        "occlusion": (occlusion.ANALYSIS, occlusion.Config(first=2 * PARTS, part_size=2, stride_px=16)),
    }


def seconds_of(analysis: Any, config: Any, run: str, data: str, address: str, cores: Sequence[int]) -> float:
    """From the beginning of the first part to the end of the last."""
    workers = Workers(num=len(cores), cpus=1, gpus=0)
    options = Options(run=run, data=data, address=address, workers=workers, log_parts=True)
    said = io.StringIO()
    with pinned(cores[0]), contextlib.redirect_stdout(said):
        sweep.run(analysis, options, config)
    parts = [json.loads(line) for line in said.getvalue().splitlines() if line.startswith('{"event": "part"')]
    ends = [datetime.fromisoformat(part["time"]).timestamp() for part in parts]
    return max(ends) - min(end - part["seconds"] for end, part in zip(ends, parts, strict=True))


def forwards(core: int, batches: int) -> float:
    """Batches a second of a plain process on one core."""
    torch.set_num_threads(1)
    with pinned(core), torch.inference_mode():
        network, x = models.build(ARCHITECTURE).eval(), torch.randn(8, 3, 224, 224)
        network(x)
        started = time.perf_counter()
        for _ in range(batches):
            network(x)
        return batches / (time.perf_counter() - started)


def at_once(cores: Sequence[int], batches: int) -> float:
    """Batches a second of one process on each core, summed."""
    with multiprocessing.get_context("spawn").Pool(len(cores)) as pool:
        return sum(pool.starmap(forwards, [(core, batches) for core in cores], chunksize=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the images, one round")
    options = parser.parse_args()
    rounds, images = (1, 768) if options.quick else (3, 1536)
    cores = sorted(os.sched_getaffinity(0))[:2]
    found: dict[str, list[float]] = {name: [] for name in (*sweeps(images), "two_plain_processes")}
    with tempfile.TemporaryDirectory() as folder:
        run, data = write_run(Path(folder), ARCHITECTURE), write_data(Path(folder) / "data", DATA, images)
        for _ in range(rounds):
            took: dict[int, dict[str, float]] = {}
            for some in (cores[:1], cores):
                with nodes_on(some) as address:
                    took[len(some)] = {
                        name: seconds_of(analysis, config, run, data, address, some)
                        for name, (analysis, config) in sweeps(images).items()
                    }
                (Location.of(run) / "results").delete()
            for name in sweeps(images):
                found[name].append(took[1][name] / took[2][name])
            found["two_plain_processes"].append(at_once(cores, 8) / at_once(cores[:1], 8))
            print({name: round(values[-1], 3) for name, values in found.items()}, took, flush=True)
    medians = {name: median(values) for name, values in found.items()}
    print(json.dumps({"ratio": min(medians[name] for name in sweeps(images)), "parts": PARTS, **medians}))


if __name__ == "__main__":
    main()
