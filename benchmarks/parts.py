"""Memory of the driver and time of a part, from a hundred parts to ten thousand.

python -m benchmarks.parts [--parts 100 1000 10000]

The whole of jobs/top9.py for zfnet_small on Ray, with one worker of one CPU and parts of a single small image, so that
nearly all is what a part costs besides its images. Each number of parts has a driver process of its own. The time of a
part is clocked from the end of the first part to the end of the last, the fold from there to the end of the job; memory
is the driver's largest resident set. `ratio` is the time of a part with the fewest over that with the most.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import tempfile
import time
from datetime import datetime
from pathlib import Path

from benchmarks.sweep import write_run
from benchmarks.training import make_shards
from pipeline import sweep
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options


def driven(parts: int) -> dict[str, float]:
    """A job of so many parts in this process: what it took."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        make_shards(data, parts)
        run = write_run(Path(name), "zfnet_small")
        workers = Workers(num=1, cpus=1, gpus=0)
        options = Options(run=run, data=str(data), split="train", workers=workers, log_parts=True)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            sweep.run(top9.ANALYSIS, options, top9.Config(part_size=1))
        ended = time.time()
    lines = [json.loads(line) for line in said.getvalue().splitlines() if line.startswith('{"event": "part"')]
    ends = sorted(datetime.fromisoformat(line["time"]).timestamp() for line in lines)
    return {
        "ms_a_part": 1e3 * (ends[-1] - ends[0]) / (parts - 1),
        "ms_a_part_at_the_end": 1e3 * (ends[-1] - ends[len(ends) * 9 // 10]) / (len(ends) - len(ends) * 9 // 10 - 1),
        "fold_seconds": ended - ends[-1],
        "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[100, 1000, 10_000])
    found = {}
    for parts in parser.parse_args().parts:
        with multiprocessing.get_context("spawn").Pool(1) as driver:
            took = driver.apply(driven, [parts])
        found[parts] = {name: round(value, 1) for name, value in took.items()}
        print(parts, found[parts], flush=True)
    fewest, most = found[min(found)], found[max(found)]
    print(json.dumps({"ratio": round(fewest["ms_a_part"] / most["ms_a_part"], 3), "parts": found}))


if __name__ == "__main__":
    main()
