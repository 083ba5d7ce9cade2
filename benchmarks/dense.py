"""Dense evaluation (OverFeat 3.5) against cutting every window out and running it through the network by itself.

python -m benchmarks.dense [--quick] [--network overfeat_accurate] [--scale 6] [--device cuda]

One image of the scale, every window of the fine stride: 630 for the accurate model at scale 6. Windows go through the
network one by one, and --batch at a time; --sample of them are measured, and the time is that of all in proportion.
Random weights: values do not matter to time. --quick takes the small network. The last line is one JSON object; `ratio`
is the time of the faster way of running windows over that of the dense one, `multiply_adds_ratio` the same in counted
multiply-adds.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zfnet import models
from zfnet.dense import Sliding


def dense(sliding: Sliding, x: Tensor) -> Tensor:
    """[classes, rows, cols] of one image."""
    return sliding.scores(sliding.pooled(x, "fine"))[0]


def by_windows(network: models.Classifier, sliding: Sliding, x: Tensor, places: list[int], batch: int) -> Tensor:
    """[len(places), classes] of the windows of these numbers, each by itself."""
    side, step = sliding.window_px, sliding.step_px["fine"]
    cols = (x.shape[3] - side) // step + 1
    corners = [(step * (place // cols), step * (place % cols)) for place in places]
    windows = [x[:, :, top : top + side, left : left + side] for top, left in corners]
    return torch.cat([network(torch.cat(windows[start : start + batch])) for start in range(0, len(windows), batch)])


def milliseconds(run: Callable[[], Tensor], repeats: int) -> float:
    """Median, after one run to warm up."""
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        if run().is_cuda:
            torch.cuda.synchronize()
        if repeat:
            times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def multiply_adds(network: str, scale: int) -> tuple[float, float, int]:
    """Of the dense evaluation and of all windows, and the number of windows; nothing is computed."""
    with torch.device("meta"), torch.inference_mode():
        built = models.build(network).eval()
        sliding = Sliding(built)
        with FlopCounterMode(display=False) as whole:
            maps = dense(sliding, torch.zeros(1, 3, *sliding.sides_px(scale)))
        with FlopCounterMode(display=False) as one:
            built(torch.zeros(1, 3, built.input_px, built.input_px))
    windows = maps[0].numel()
    return whole.get_total_flops() / 2, windows * one.get_total_flops() / 2, windows


@torch.inference_mode()
def main() -> None:
    """Measure, print, one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--network", default=None)
    parser.add_argument("--scale", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sample", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    name = options.network or ("overfeat_accurate_small" if options.quick else "overfeat_accurate")
    dense_adds, window_adds, windows = multiply_adds(name, options.scale)

    torch.manual_seed(0)
    network = models.build(name).eval().to(options.device)
    sliding = Sliding(network)
    x = torch.randn(1, 3, *sliding.sides_px(options.scale)).to(options.device)
    places = [number * windows // options.sample for number in range(options.sample)]
    dense_ms = milliseconds(lambda: dense(sliding, x), options.repeats)
    found = {
        batch: milliseconds(partial(by_windows, network, sliding, x, places, batch), options.repeats)
        * (windows / len(places))
        for batch in (1, options.batch)
    }
    windows_ms = min(found.values())
    print(
        f"{name}, scale {options.scale} ({x.shape[2]} x {x.shape[3]} px), {windows} windows: dense {dense_ms:.0f} ms; "
        + ", ".join(f"{batch} at a time {ms:.0f} ms" for batch, ms in found.items())
    )
    print(
        json.dumps(
            {
                "network": name,
                "scale": options.scale,
                "windows": windows,
                "measured_windows": len(places),
                "dense_ms": dense_ms,
                "windows_ms": windows_ms,
                "ratio": windows_ms / dense_ms,
                "multiply_adds_ratio": window_adds / dense_adds,
                "device": options.device,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
