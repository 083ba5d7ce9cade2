"""Memory of the driver and time of a part, from a hundred parts to ten thousand.

python -m benchmarks.parts [--parts 100 1000 10000]

The whole of jobs/top9.py for zfnet_small on Ray, with one worker of one CPU and parts of a single small image, so that
nearly all is what a part costs besides its images. Each job has a driver process of its own. The time of a part is
clocked from the end of the first part to the end of the last, the fold from there to the end of the job. `ratio` is the
time of a part with the fewest over that with the most.

`driver_mb` is the driver's largest resident set; looked at every 20 ms, `private_mb` is the largest before the first
part ends, then until the last one does, then in the fold; `shared_mb` are pages of Ray's object store that it looked
into; the rest is code. More parts are more images here, whose rows the driver holds too: so the last job has the fewest
parts of all the images, and `growth_mb` is told against it (of_parts) and against the fewest of one image each.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pipeline import sweep
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options

ARCHITECTURE = "zfnet_small"
T = TypeVar("T")


class Resident(threading.Thread):
    """What this process holds in memory, all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.looks: list[tuple[float, float, float]] = []

    def run(self) -> None:
        """Look at it every 20 ms."""
        while True:
            now = {name: int(size.split()[0]) / 1024 for name, size in self._status() if name.startswith("Rss")}
            self.looks.append((time.time(), now["RssAnon"], now["RssShmem"]))
            time.sleep(0.02)

    def _status(self) -> Iterator[list[str]]:
        return (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())

    def largest(self, start: float, end: float) -> tuple[float, float]:
        """MB of its own, and of memory shared with other processes."""
        looks = [look for look in self.looks if start <= look[0] < end]
        return max(own for _, own, _ in looks), max(shared for _, _, shared in looks)


def prepare(folder: Path, images: int) -> None:
    """A run, and shards of so many images."""
    from benchmarks.sweep import write_run  # not above: a driver imports what the job does, and nothing else
    from benchmarks.training import make_shards

    (folder / "data").mkdir()
    make_shards(folder / "data", images)
    write_run(folder, ARCHITECTURE)


def driven(folder: Path, parts: int, images: int) -> dict[str, Any]:
    """A job of so many parts of all these images in this process: what it took."""
    workers = Workers(num=1, cpus=1, gpus=0)
    run, data = str(folder / ARCHITECTURE), str(folder / "data")
    options = Options(run=run, data=data, split="train", workers=workers, log_parts=True)
    resident = Resident()
    resident.start()
    with (folder / "said").open("w") as said, contextlib.redirect_stdout(said):
        sweep.run(top9.ANALYSIS, options, top9.Config(part_size=images // parts))
    ended = time.time()
    driver_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = (folder / "said").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines if line.startswith('{"event": "part"')]
    ends = sorted(datetime.fromisoformat(time).timestamp() for time in times)
    tenth = len(ends) * 9 // 10
    phases = [resident.largest(*phase) for phase in itertools.pairwise([0.0, ends[0], ends[-1], ended])]
    return {
        "ms_a_part": round(1e3 * (ends[-1] - ends[0]) / (parts - 1), 1),
        "ms_a_part_at_the_end": round(1e3 * (ends[-1] - ends[tenth]) / (len(ends) - tenth - 1), 1),
        "fold_seconds": round(ended - ends[-1], 1),
        "driver_mb": round(driver_mb, 1),
        "private_mb": [round(own, 1) for own, _ in phases],
        "shared_mb": round(max(shared for _, shared in phases), 1),
    }


def alone(do: Callable[..., T], *arguments: Any) -> T:
    """The result of a call in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        return processes.apply(do, arguments)


def measured(parts: int, images: int) -> dict[str, Any]:
    """The same in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        alone(prepare, Path(name), images)
        found = alone(driven, Path(name), parts, images)
    print(f"{parts} parts of {images} images: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[100, 1000, 10_000])
    counts = sorted(parser.parse_args().parts)
    found = {parts: measured(parts, parts) for parts in counts}
    fewest, most = found[counts[0]], found[counts[-1]]
    same_images = measured(counts[0], counts[-1])
    ratio = round(fewest["ms_a_part"] / most["ms_a_part"], 3)
    of_parts, with_images = (round(most["driver_mb"] - less["driver_mb"], 1) for less in (same_images, fewest))
    growth = {"of_parts": of_parts, "of_parts_and_images": with_images}
    print(json.dumps({"ratio": ratio, "growth_mb": growth, "parts": found, "same_images": same_images}))


if __name__ == "__main__":
    main()
