"""A cost model of sweeps, fitted here, tried on a run that it has not seen, and what it says of larger data.

python -m benchmarks.forecast [--quick] [--threads 2]

seconds = start-up + images * (decode + forward) / cores + parts * commit. The whole of jobs/top9.py for zfnet_small and
zfnet (conv1-5) is clocked in one process for several numbers of images and sizes of parts; the three terms are fitted
by least squares to all but one of them, and the one is predicted. `error` is the larger of both networks' errors on
their held-out run, in shares of the measured time; `ratio` is 1 - error.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.scaling import DATA, whole_job
from benchmarks.sweep import write_data, write_run

GOALS = {"ImageNet validation": 50_000, "ImageNet training": 1_281_167, "a thousand million": 10**9}
MAPS = {"zfnet": 1376, "zfnet_small": 320}
NODE_CORES = 16
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


def forecast(network: str, model: np.ndarray, images: int) -> dict[str, float]:
    """Of a node of 16 such cores: hours, what the parts' commits are of it, GB of `maxima` and of the index."""
    case = Case(images, PART)
    start, decoding, commits = np.array(case.terms(NODE_CORES)) * model
    return {
        "hours": round(float(start + decoding + commits / NODE_CORES) / 3600, 3),
        "parts": case.parts,
        "fold_hours": round(case.parts * 0.005 / 3600, 3),  # 53 s for 10,000 parts, docs/performance.md
        "maxima_gb": round(images * MAPS[network] * 8 / 1e9, 1),
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
        found[network] = {"error": error, **named, "measured": measured}
        print(f"{network}: {named}; held out {cases[-1]}: {error:.1%} off; measured {measured}")
        for goal, images in GOALS.items():
            print(f"  {goal}: {forecast(network, model, images)}")
    error = max(of["error"] for of in found.values())
    print(json.dumps({"ratio": 1 - error, "error": error, **found}))


if __name__ == "__main__":
    main()
