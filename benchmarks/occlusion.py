"""Occlusion against captum's Occlusion: the same network, image, positions and threads, in one run.

python -m benchmarks.occlusion [--quick] [--device cuda] [--dtype bfloat16]

captum shows the network whole occluded images, so many at a time as it is told (perturbations_per_eval); several are
tried in both of torch's memory formats, and the best is taken. What it computes on the way, the target's probability
at every position, is noted and compared with our map. Where captum is not installed (a machine with a GPU and plain
torch), whole occluded images in a plain loop take its place, and the result says so. The limit is what counted
multiply-adds allow, fully connected layers included. The last line is one JSON object; its `ratio` is that of the 32
pixel square.
"""

import argparse
import json
import time
from statistics import median

import torch
from torch import Tensor, nn

from zfnet.graph import Graph
from zfnet.incremental import Incremental
from zfnet.models import build
from zfnet.occlusion import Grid, sensitivity
from zfnet.tracing import trace

INPUT_PX = 224
SQUARES = ((16, 4), (32, 8), (50, 6), (64, 16))
AT_A_TIME = (4, 16, 32, 64)
QUICK_AT_A_TIME = (16, 64)
FORMATS = {torch.contiguous_format: "rows innermost", torch.channels_last: "channels last"}
OTHERS = (("alexnet", (32, 16)), ("vgg16", (32, 32)))


def network(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """With weights that keep the signal's size from layer to layer; ImportError where torchvision is missing."""
    torch.manual_seed(0)
    if name == "zfnet":
        model: nn.Module = build(name)
    else:
        from torchvision import models

        model = models.get_model(name, weights=None)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter)
    return model.eval().to(device, dtype)


try:
    import captum
    from captum.attr import Occlusion

    PEER = f"captum {captum.__version__}"
except ImportError:
    PEER = "whole images in plain torch (captum is not installed)"


def peer_probabilities(
    model: nn.Module, clean: Tensor, filled: Tensor, grid: Grid, target: int, at_a_time: int
) -> Tensor:
    """The target's probability at every position, without anything that we know of the network."""
    if PEER.startswith("captum"):
        return captum_probabilities(model, clean, filled, grid, target, at_a_time)
    side, positions = grid.occluder_px, [(r, c) for r in range(grid.rows) for c in range(grid.cols)]
    seen = []
    with torch.no_grad():
        for start in range(0, len(positions), at_a_time):
            some = positions[start : start + at_a_time]
            batch = clean.repeat(len(some), 1, 1, 1)
            for image, (row, col) in zip(batch, some, strict=True):
                window = (
                    slice(row * grid.stride_px, row * grid.stride_px + side),
                    slice(col * grid.stride_px, col * grid.stride_px + side),
                )
                image[:, *window] = filled[:, *window]
            seen.append(model(batch).float().softmax(1)[:, target])
    return torch.cat(seen).view(grid.rows, grid.cols)


def captum_probabilities(
    model: nn.Module, clean: Tensor, filled: Tensor, grid: Grid, target: int, at_a_time: int
) -> Tensor:
    """The target's probability at every position, as captum's Occlusion sees it."""
    seen = []

    def forward(x: Tensor) -> Tensor:
        probabilities = model(x).float().softmax(1)
        seen.append(probabilities[:, target].clone())
        return probabilities

    with torch.no_grad():
        Occlusion(forward).attribute(
            clean[None],
            sliding_window_shapes=(3, grid.occluder_px, grid.occluder_px),
            strides=(3, grid.stride_px, grid.stride_px),
            baselines=filled[None],
            target=target,
            perturbations_per_eval=at_a_time,
        )
    _unoccluded, *occluded = seen  # captum runs the unoccluded image first; its last positions hang over
    per_side = -(-(INPUT_PX - grid.occluder_px) // grid.stride_px) + 1
    return torch.cat(occluded).view(per_side, per_side).T[: grid.rows, : grid.cols]  # it goes column by column


def best_setting(model: nn.Module, clean: Tensor, filled: Tensor, options: argparse.Namespace) -> int:
    """Gives the model the memory format, and returns the perturbations_per_eval, with which captum is fastest."""
    probe = Grid(INPUT_PX, 32, 32 if options.device == "cpu" else 8)
    tried = QUICK_AT_A_TIME if options.quick else AT_A_TIME
    times = {}
    for memory_format in FORMATS:
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
        peer_probabilities(model, clean, filled, Grid(INPUT_PX, 112, 112), 0, 4)
        for at_a_time in tried:
            start = time.perf_counter()
            peer_probabilities(model, clean, filled, probe, 0, at_a_time).cpu()
            times[memory_format, at_a_time] = (time.perf_counter() - start) / probe.rows / probe.cols
        each = ", ".join(f"{n}: {1e3 * times[memory_format, n]:.2f}" for n in tried)
        print(f"  {PEER}, {FORMATS[memory_format]}, ms a position by perturbations_per_eval: {each}", flush=True)
    memory_format, at_a_time = min(times, key=times.__getitem__)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    return at_a_time


def compare(
    model: nn.Module,
    graph: Graph,
    images: tuple[Tensor, Tensor],
    grid: Grid,
    at_a_time: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Medians of alternating repeats, ours and captum's, with the limit and the error."""
    clean, filled = images
    whole, windows = Incremental(graph, grid.extents(), graph.activation_of(graph.last_convolution)).multiply_adds()
    times: dict[str, list[float]] = {"ours": [], "captum": []}
    error = 0.0
    for _ in range(options.repeats):
        start = time.perf_counter()
        found = sensitivity(graph, clean, filled, grid, memory_mb=options.memory_mb)
        target, got = found.target, found.probability_map.cpu()
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        reference = peer_probabilities(model, clean, filled, grid, target, at_a_time).cpu()
        times["captum"].append(time.perf_counter() - start)
        error = max(error, float((got - reference).abs().max() / reference.abs().max()))
    captum, ours = (median(times[name]) for name in ("captum", "ours"))
    positions = grid.rows * grid.cols
    # captum's grid has one more position a side where the square hangs over; time is compared a position.
    per_side = -(-(INPUT_PX - grid.occluder_px) // grid.stride_px) + 1
    captum_positions = per_side**2 if PEER.startswith("captum") else positions
    row = {
        "square_px": grid.occluder_px,
        "stride_px": grid.stride_px,
        "captum_ms": 1e3 * captum / captum_positions,
        "ours_ms": 1e3 * ours / positions,
        "limit": whole / windows,
        "error": error,
    }
    row["ratio"] = row["captum_ms"] / row["ours_ms"]
    row["share_of_limit"] = row["ratio"] / row["limit"]
    print(
        f"  {grid.occluder_px:3d} px / {grid.stride_px:2d}: captum {row['captum_ms']:7.2f} ms, "
        f"ours {row['ours_ms']:6.2f} ms a position: {row['ratio']:5.2f} times; "
        f"limit {row['limit']:.2f}, share {row['share_of_limit']:.2f}; error {error:.1e}; "
        f"whole from {found.dense_from}",
        flush=True,
    )
    return row


def measure(name: str, squares: list[tuple[int, int]], options: argparse.Namespace) -> list[dict[str, float]]:
    """All squares on one network."""
    dtype = getattr(torch, options.dtype)
    model = network(name, options.device, dtype)
    graph = trace(model, (3, INPUT_PX, INPUT_PX))
    clean = torch.randn(3, INPUT_PX, INPUT_PX, generator=torch.Generator().manual_seed(0)).to(options.device, dtype)
    filled = torch.zeros_like(clean)
    print(f"{name}, {options.dtype} on {options.device}, {torch.get_num_threads()} threads", flush=True)
    at_a_time = best_setting(model, clean, filled, options)
    warm = Grid(INPUT_PX, 112, 112)
    sensitivity(graph, clean, filled, warm, memory_mb=options.memory_mb)
    return [compare(model, graph, (clean, filled), Grid(INPUT_PX, *square), at_a_time, options) for square in squares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="stride 16 for all squares; under 3 minutes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for both sides")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-mb", type=float, default=256, help="of ours, as in jobs/occlusion.py")
    parser.add_argument("--squares", type=int, nargs="+", help="only these of 16, 32, 50 and 64 px, and ZFNet alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    chosen = [(px, 16 if options.quick else s) for px, s in SQUARES if px in (options.squares or [px])]
    results = {"zfnet": measure("zfnet", chosen, options)}
    for name, square in () if options.squares else OTHERS:
        try:
            results[name] = measure(name, [square], options)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    ratio = next((row["ratio"] for row in results["zfnet"] if row["square_px"] == 32), results["zfnet"][0]["ratio"])
    worst = max(row["error"] for rows in results.values() for row in rows)
    print(json.dumps({"ratio": ratio, "error": worst, "threads": torch.get_num_threads(), "networks": results}))


if __name__ == "__main__":
    main()
