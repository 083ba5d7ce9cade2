"""LocalResponseNorm, forward and backward, against torch's, at ZFNet's shapes.

python -m benchmarks.normalisation [--quick] [--device cuda] [--dtype bfloat16]

The last line is one JSON object; its `ratio` is that of all shapes and batches together, and its error that of outputs
and gradients. torch's own module takes no bfloat16 on a CPU; there it runs in float32.
"""

import argparse
import json
import time
from statistics import median

import torch
from torch import Tensor, nn

from zfnet.normalisation import LocalResponseNorm

SHAPES = {"norm1": (96, 55, 55), "norm2": (256, 13, 13)}
"""ZFNet normalises what its first and second pool give."""


def forward_backward(module: nn.Module, x: Tensor, gradient: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds, the output, and the gradient at the input."""
    leaf = x.detach().requires_grad_()
    start = time.perf_counter()
    y = module(leaf)
    y.backward(gradient)
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert leaf.grad is not None
    return seconds, y.detach(), leaf.grad


def compare(name: str, batch: int, options: argparse.Namespace) -> dict[str, float | str]:
    """Medians of alternating repeats."""
    dtype = getattr(torch, options.dtype)
    peer_dtype = torch.float32 if options.device == "cpu" else dtype
    generator = torch.Generator().manual_seed(batch)
    x, gradient = (torch.randn(batch, *SHAPES[name], generator=generator).to(options.device) for _ in range(2))
    x = 20 * x.relu()  # large enough for the divisor to matter
    ours, peer = LocalResponseNorm(), nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    error = 0.0
    for repeat in range(options.repeats + 1):
        seconds, *got = forward_backward(ours, x.to(dtype), gradient.to(dtype))
        peer_seconds, *reference = forward_backward(peer, x.to(peer_dtype), gradient.to(peer_dtype))
        if repeat:  # the first warms up
            times["ours"].append(seconds)
            times["torch"].append(peer_seconds)
        errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(got, reference, strict=True)]
        error = max(error, *map(float, errors))
    ours_ms, torch_ms = (1e3 * median(times[side]) for side in ("ours", "torch"))
    ratio = torch_ms / ours_ms
    print(
        f"{name} x {batch:3d}: torch {torch_ms:8.2f} ms, ours {ours_ms:7.2f} ms: {ratio:5.2f} times; error {error:.1e}"
    )
    return {"name": name, "batch": batch, "torch_ms": torch_ms, "ours_ms": ours_ms, "ratio": ratio, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats; under a minute")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, for both sides")
    options = parser.parse_args()
    options.repeats = 5 if options.quick else 15
    torch.set_num_threads(options.threads)
    print(f"{options.dtype} on {options.device}, {options.threads} threads, forward and backward")
    rows = [compare(name, batch, options) for name in SHAPES for batch in (1, 16, 128)]
    ratio = sum(float(row["torch_ms"]) for row in rows) / sum(float(row["ours_ms"]) for row in rows)
    print(json.dumps({"ratio": ratio, "error": max(float(row["error"]) for row in rows), "rows": rows}))


if __name__ == "__main__":
    main()
