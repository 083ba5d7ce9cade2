"""Time of a sweep against the number of images: a line through the fixed start-up.

python -m benchmarks.scaling [--quick] [--threads 2]

The whole of jobs/top9.py for zfnet_small, in one process, over 1,000 to 8,000 images of caltech101, each number several
times in turn. Start-up is what it takes for a single image. `error` is the largest distance of a measured time from
the line, in shares of that time; `ratio` is 1 - error.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.sweep import clock, write_data, write_run
from pipeline import sweep
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.storage import Location

DATA = tuple(
    f"../shared/data/caltech101/{split}-{number:06d}.tar"
    for split, count in (("train", 7), ("val", 2))
    for number in range(count)
)


def whole_job(run: str, data: str, threads: int, part_size: int = 256) -> float:
    """Seconds of the sweep, its fold included; its results are deleted."""
    options = Options(run=run, data=data, workers=Workers(num=0, cpus=threads))
    with contextlib.redirect_stdout(io.StringIO()):
        seconds = clock(lambda: sweep.run(top9.ANALYSIS, options, top9.Config(part_size=part_size)))
    (Location.of(run) / "results").delete()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 to 4,000 images, fewer repeats; under 3 minutes")
    parser.add_argument("--data", nargs="+", default=DATA, help="tars; relative to the project")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    numbers = (500, 1000, 2000, 4000) if options.quick else (1000, 2000, 4000, 8000)
    torch.set_num_threads(1)
    times: dict[int, list[float]] = {number: [] for number in (1, *numbers)}
    with tempfile.TemporaryDirectory() as name:
        run = write_run(Path(name), "zfnet_small")
        data = {number: write_data(Path(name) / f"{number}", options.data, number) for number in times}
        for repeat in range(4 if options.quick else 6):
            for number, some in times.items():
                seconds = whole_job(run, data[number], options.threads)
                some += [seconds] if repeat else []  # the first warms up
    start_up = median(times.pop(1))
    measured = {number: median(some) for number, some in times.items()}
    x, y = np.array(list(measured), dtype=float), np.array(list(measured.values())) - start_up
    slope = float((x * y).sum() / (x * x).sum())
    fitted = {number: start_up + slope * number for number in measured}
    errors = {number: abs(fitted[number] - seconds) / seconds for number, seconds in measured.items()}
    print(f"start-up {start_up:.2f} s, then {1 / slope:.0f} images/s")
    for number, seconds in measured.items():
        print(f"{number:6d} images: {seconds:7.2f} s, the line says {fitted[number]:7.2f} s: {errors[number]:.1%} off")
    error = max(errors.values())
    print(json.dumps({"ratio": 1 - error, "error": error, "start_up": start_up, "seconds": measured}))


if __name__ == "__main__":
    main()
