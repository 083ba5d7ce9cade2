"""A cost model of sweeps, fitted here, tried on a run that it has not seen, and what it says of larger data.

python -m benchmarks.forecast [--quick] [--threads 2]

seconds = start-up + images * (decode + forward) / cores + parts * commit / actors. The whole of jobs/top9.py for
zfnet_small and zfnet (conv1-5) is clocked in one process, one actor, for several numbers of images and sizes of parts;
the three terms are fitted by least squares to all but one of them, and the one is predicted. Decoding is clocked alone
on one core, so that what is left of an image is the forward pass. The forecast is of images as large as ImageNet's: it
takes the decoding of some of these instead, and the bytes of ILSVRC 2012's archives. `error` is the larger of both
networks' errors on their held-out run, in shares of the measured time; `ratio` is 1 - error.
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

IMAGENET = ("../shared/data/imagenet-samples/val-000000.tar",)
GOALS = {
    "ImageNet validation": (50_000, 6_744_924_160),
    "ImageNet training": (1_281_167, 147_897_477_120),
    "a thousand million": (10**9, 115_440 * 10**9),
}
"""Images, and bytes: of ILSVRC 2012's archives, and a thousand million as large as those of its training set."""
MAPS = {"zfnet": 1376, "zfnet_small": 320}
NODE_CORES = 16
NODES = (1, 10, 100)
FOLDED = 10_000
FOLD_SECONDS = {"in_one_process": (47.1, 48.3), "in_tasks_on_two_cores": (36.2, 36.7)}
"""The least and the most that FOLDED parts took: docs/performance.md."""
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


def decoding(network: str, tars: Sequence[str], images: int) -> tuple[float, float]:
    """Seconds of a core, and bytes of the shards, for an image of these tars."""
    with tempfile.TemporaryDirectory() as name:
        preprocessing = Run.at(write_run(Path(name), network)).load_model().preprocessing
        index = Index.load(write_data(Path(name) / "data", tars, images))
        rows = index.split("val")
        encoded = [sample.image for sample in index.read(rows) if isinstance(sample, Sample)]
    size = preprocessing.resize_px, preprocessing.crop_px
    seconds = median(clock(lambda: decode(encoded, size)) for _ in range(3))
    return seconds / len(encoded), float(np.mean(rows["bytes"].to_numpy()))


def forecast(network: str, model: np.ndarray, actors_a_node: int, images: int, read_bytes: int) -> dict[str, Any]:
    """Hours on nodes of 16 such cores, seconds of the fold, GB that are read and written."""
    case = Case(images, PART)
    start, computing, commits = np.array(case.terms(NODE_CORES)) * model
    hours = {n: float(start + (computing + commits / actors_a_node) / n) / 3600 for n in NODES}
    return {
        "hours_by_nodes": {n: round(some, 3) for n, some in hours.items()},
        "parts": case.parts,
        "fold_seconds": {how: [round(case.parts * s / FOLDED, 1) for s in of] for how, of in FOLD_SECONDS.items()},
        "read_gb": round(read_bytes / 1e9, 1),
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
        alone, bytes_ = decoding(network, DATA, n)
        imagenet, imagenet_bytes = decoding(network, IMAGENET, n)
        larger = model + np.array([0.0, imagenet - alone, 0.0])
        found[network] = {
            "error": error,
            **named,
            "core_seconds_decoding": alone,
            "bytes": bytes_,
            "core_seconds_decoding_imagenet": imagenet,
            "bytes_imagenet": imagenet_bytes,
            "measured": measured,
        }
        print(f"{network}: {named}; held out {cases[-1]}: {error:.1%} off; measured {measured}")
        print(f"  of an image, decoding {1e3 * alone:.2f} ms of a core, {bytes_:.0f} bytes")
        print(f"  of ImageNet's {1e3 * imagenet:.2f} ms, {imagenet_bytes:.0f} bytes")
        for goal, (images, read) in GOALS.items():
            print(f"  {goal}: {forecast(network, larger, NODE_CORES // options.threads, images, read)}")
    error = max(of["error"] for of in found.values())
    print(json.dumps({"ratio": 1 - error, "error": error, **found}))


if __name__ == "__main__":
    main()
