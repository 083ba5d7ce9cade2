"""A cost model of sweeps, fitted here, tried on a run that it has not seen, and what it says of larger data.

python -m benchmarks.forecast [--quick] [--threads 2]

seconds = start-up + images * (decode + forward) / cores + parts * commit / actors. The whole of jobs/top9.py for
zfnet_small and zfnet (conv1-5) is clocked in one process, one actor, for several numbers of images and sizes of parts;
the three terms are fitted by least squares to all but one of them, and the one is predicted. Decoding is clocked alone
on one core, so that what is left of an image is the forward pass; bytes are those of the shards. `error` is the larger
of both networks' errors on their held-out run, in shares of the measured time; `ratio` is 1 - error.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.scaling import DATA, whole_job
from benchmarks.sweep import clock, decode, write_data, write_run
from pipeline.analyses.top9 import MAXIMA_BYTES
from pipeline.runs import Run
from pipeline.shards import Index, Sample

GOALS = {"ImageNet validation": 50_000, "ImageNet training": 1_281_167, "a thousand million": 10**9}
MAPS = {"zfnet": 1376, "zfnet_small": 320}
NODE_CORES = 16
NODES = (1, 10, 100)
FOLD_SECONDS = 56 / 10_000
"""For a part, in one process: docs/performance.md."""
PART = 256


@dataclass(frozen=True)
class Case:
    """A run of the job."""

    images: int
    part_size: int

    @property
    def parts(self) -> int:
        """How many parts it has."""
        return -(-self.images // self.part_size)

    def terms(self, cores: int) -> list[float]:
        """What the three terms of the model are multiplied with."""
        return [1.0, self.images / cores, float(self.parts)]


def fit(network: str, cases: Sequence[Case], threads: int, repeats: int) -> tuple[np.ndarray, float, dict[str, float]]:
    """Start-up, seconds of a core for an image, seconds of a part; the error on the last case; what was measured."""
    with tempfile.TemporaryDirectory() as name:
        run = write_run(Path(name), network)
        data = {n: write_data(Path(name) / f"{n}", DATA, n) for n in {case.images for case in cases}}
        times: dict[Case, list[float]] = {case: [] for case in cases}
        for repeat in range(repeats + 1):
            for case, some in times.items():
                seconds = whole_job(run, data[case.images], threads, case.part_size)
                some += [seconds] if repeat else []  # the first warms up
    measured = {case: median(some) for case, some in times.items()}
    *seen, held_out = cases
    x = np.array([case.terms(threads) for case in seen])
    y = np.array([measured[case] for case in seen])
    model, _ = nnls(x / y[:, None], np.ones(len(seen)))  # errors count in shares
    predicted = float(np.dot(held_out.terms(threads), model))
    error = abs(predicted - measured[held_out]) / measured[held_out]
    return model, error, {f"{case.images}/{case.part_size}": round(seconds, 3) for case, seconds in measured.items()}


def decoding(network: str, images: int) -> tuple[float, float]:
    """Seconds of a core, and bytes of the shards, for an image of DATA."""
    with tempfile.TemporaryDirectory() as name:
        preprocessing = Run.at(write_run(Path(name), network)).load_model().preprocessing
        index = Index.load(write_data(Path(name) / "data", DATA, images))
        rows = index.split("val")
        encoded = [sample.image for sample in index.read(rows) if isinstance(sample, Sample)]
    size = preprocessing.resize_px, preprocessing.crop_px
    seconds = median(clock(lambda: decode(encoded, size)) for _ in range(3))
    return seconds / len(encoded), float(np.mean(rows["bytes"].to_numpy()))


def forecast(network: str, model: np.ndarray, actors_a_node: int, bytes_: float, images: int) -> dict[str, Any]:
    """Hours on nodes of 16 such cores, hours of the fold in one process, GB that are read and written."""
    case = Case(images, PART)
    start, computing, commits = np.array(case.terms(NODE_CORES)) * model
    hours = {n: float(start + (computing + commits / actors_a_node) / n) / 3600 for n in NODES}
    return {
        "hours_by_nodes": {n: round(some, 3) for n, some in hours.items()},
        "parts": case.parts,
        "fold_hours": round(case.parts * FOLD_SECONDS / 3600, 3),
        "read_gb": round(images * bytes_ / 1e9, 1),
        "maxima_gb": round(images * MAPS[network] * MAXIMA_BYTES / 1e9, 1),
        "index_gb": round(images * 100 / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats; under 3 minutes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale = {"zfnet_small": 500, "zfnet": 64} if options.quick else {"zfnet_small": 1000, "zfnet": 256}
    found = {}
    for network, n in scale.items():
        cases = [Case(1, PART), Case(n, PART), Case(n, 32), Case(2 * n, PART), Case(2 * n, 16), Case(4 * n, 64)]
        model, error, measured = fit(network, cases, options.threads, 1 if options.quick else 3)
        named = dict(zip(("start_up", "core_seconds_an_image", "seconds_a_part"), model.tolist(), strict=True))
        alone, bytes_ = decoding(network, n)
        found[network] = {
            "error": error,
            **named,
            "core_seconds_decoding": alone,
            "bytes": bytes_,
            "measured": measured,
        }
        print(f"{network}: {named}; held out {cases[-1]}: {error:.1%} off; measured {measured}")
        print(f"  of an image, decoding {1e3 * alone:.2f} ms of a core, {bytes_:.0f} bytes")
        for goal, images in GOALS.items():
            print(f"  {goal}: {forecast(network, model, NODE_CORES // options.threads, bytes_, images)}")
    error = max(of["error"] for of in found.values())
    print(json.dumps({"ratio": 1 - error, "error": error, **found}))


if __name__ == "__main__":
    main()
