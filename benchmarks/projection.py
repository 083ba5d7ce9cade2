"""Projections of a whole top-9 table: ours against captum's Deconvolution, same machine, same threads.

python -m benchmarks.projection --quick
python -m benchmarks.projection --data ../shared/data/imagenet-samples
python -m benchmarks.projection --data ../shared/data/caltech101 --peer-cells 24

ZFNet without contrast normalisation, random weights. The table is made first, outside the clock: the nine strongest
cells of every feature map of conv1 to conv5 over all images. Ours is clocked over the whole table, forward passes
included (`--quick`: over a sample of the images with all their cells, so that cells, layers and forward passes keep
their shares). captum pays one forward and one backward pass for every cell, whatever the image, so its time is
that of a sample of each layer's cells at its best batch size, times the cells of the layer. Repeats alternate. Where
captum is not installed, the same arithmetic written with autograd takes its place, and the result says so.
"""

import argparse
import io
import json
import resource
import statistics
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zfnet import deconv, images
from zfnet.activations import NONE, TopK, strongest
from zfnet.deconv import Cells, project_images
from zfnet.graph import Graph
from zfnet.models.layers import Network
from zfnet.models.zfnet import ZFNET
from zfnet.receptive import receptive_field
from zfnet.tracing import trace

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
BATCH = 16
PEER_BATCHES = (1, 4, 16, 32)
Attribute = Callable[[Tensor, list[tuple[int, ...]]], Tensor]
"""Images [M, 3, rows, cols], a cell of each -> its projection, started from 1."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    network = _network().to(device, dtype)
    graph = trace(network)
    keys, pixels = _read(Path(options.data), options.images)
    normalise = images.Preprocessing(resize_px=256, crop_px=224, mean=torch.full((3, 1, 1), 120.0)).normalise

    def batch(numbers: Any) -> Tensor:
        return normalise(torch.from_numpy(pixels[numbers])).to(device, dtype)

    table = _top9(graph, batch, keys)
    report: dict[str, Any] = {"data": Path(options.data).name, "images": len(keys), **_machine(options)}
    report["cells"] = {layer: len(cells.image) for layer, cells in table.items()}
    report["distinct_images"] = len(torch.cat([cells.image for cells in table.values()]).unique())
    chosen = _sampled(table, len(keys), 0.125 if options.quick else 1.0)
    report["cells_clocked"] = {layer: len(cells.image) for layer, cells in chosen.items()}
    if device.type == "cuda":
        torch.cuda.synchronize()

    peer_cells = {layer: _some(cells, options.peer_cells) for layer, cells in table.items()}
    peers, report["peer"] = _peers(network)
    best = {layer: _best_batch(peers[layer], batch, cells) for layer, cells in peer_cells.items()}
    report["peer_batch"] = {layer: size for layer, (size, _) in best.items()}
    ours_s: list[float] = []
    peer_s: dict[str, list[float]] = {layer: [] for layer in LAYERS}
    list(_ours(graph, batch, _some_images(chosen, BATCH)))  # the first call allocates and compiles
    for _ in range(options.repeats):
        ours_s.append(_clocked(lambda: _consume(_ours(graph, batch, chosen))))
        for layer in LAYERS:
            run = _peer_run(peers[layer], batch, peer_cells[layer], best[layer][0])
            peer_s[layer].append(_clocked(run) / len(peer_cells[layer].image))
    per_cell = {layer: statistics.median(seconds) for layer, seconds in peer_s.items()}
    seconds = statistics.median(ours_s)
    peer = sum(per_cell[layer] * len(chosen[layer].image) for layer in LAYERS)
    up, down = deconv.multiply_adds(graph, len(keys), chosen)
    peer_work = sum(2 * _forward(graph, layer) * len(cells.image) for layer, cells in chosen.items())
    report |= {
        "ours_s": round(seconds, 3),
        "peer_s": round(peer, 3),
        "peer_ms_a_cell": {layer: round(1e3 * value, 3) for layer, value in per_cell.items()},
        "ours_ms_a_cell": round(1e3 * seconds / sum(report["cells_clocked"].values()), 3),
        "multiply_adds": {"forward": up, "down": down, "peer": peer_work},
        "limit": round(peer_work / (up + down), 2),
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "error": _error(graph, batch, peers, {layer: _some(cells, 12) for layer, cells in peer_cells.items()}),
    }
    for name, value in report.items():
        print(f"{name}: {value}")
    print(json.dumps({"ratio": round(peer / seconds, 2), **report}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/imagenet-samples", help="folder of tar shards of JPEGs")
    parser.add_argument("--images", type=int, help="take the first so many images (default all)")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: an eighth of the images, fewer repeats")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken")
    parser.add_argument("--peer-cells", type=int, default=64, help="cells of each layer that the peer is clocked on")
    options = parser.parse_args()
    if options.quick:
        options.peer_cells = min(options.peer_cells, 24)
    return options


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": name, "dtype": options.dtype, "threads": options.threads, "torch": torch.__version__,
        "quick": options.quick, "memory_mb": deconv.MEMORY_MB,
    }  # fmt: skip


# --- the network, the images, the table -------------------------------------------------------------------------------


def _network() -> Network:
    """ZFNet's convolutions without contrast normalisation, so that every peer's definition agrees with ours."""
    plain = tuple(replace(convolution, normalise=None) for convolution in ZFNET.convolutions)
    network = Network(replace(ZFNET, convolutions=plain, linears=()), classes=1).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
    return network


def _read(folder: Path, count: int | None) -> tuple[list[str], Any]:
    """Keys and uint8 pixels [N, 224, 224, 3] of the JPEGs in a folder's tar files, in the order of their keys."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.endswith(".jpg") else None
                if file is not None:
                    found[member.name] = file.read()
    if not found:
        raise SystemExit(f"{folder} has no tar file with JPEGs: give --data a folder of WebDataset shards")
    keys = sorted(found)[:count]
    pixels = np.empty((len(keys), 224, 224, 3), np.uint8)

    def decode(number: int) -> None:
        image = images.decode(io.BytesIO(found[keys[number]]).getvalue())
        pixels[number] = images.centre_crop(image, 256, 224)[0]

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(keys))))
    return keys, pixels


def _top9(graph: Graph, batch: Callable[[Any], Tensor], keys: list[str]) -> dict[str, Cells]:
    """The nine strongest cells of every feature map of every layer."""
    targets = {layer: graph.activation_of(layer) for layer in LAYERS}
    states: dict[str, list[TopK]] = {layer: [] for layer in LAYERS}
    for numbers in _slices(len(keys)):
        outputs = graph.run(batch(numbers).contiguous(memory_format=torch.channels_last), list(targets.values()))
        for layer, target in targets.items():
            states[layer].append(
                TopK.of(strongest(outputs[target].contiguous()), np.arange(numbers.start, numbers.stop), 9)
            )
    return {layer: _cells(TopK.merge(some)) for layer, some in states.items()}


def _cells(top: TopK) -> Cells:
    taken = top.sample != NONE
    feature_map = np.broadcast_to(np.arange(len(taken))[:, None], taken.shape)
    return Cells(*(torch.from_numpy(column[taken].copy()) for column in (top.sample, feature_map, top.row, top.col)))


def _slices(count: int) -> Iterator[slice]:
    return (slice(first, min(first + BATCH, count)) for first in range(0, count, BATCH))


def _some(cells: Cells, count: int) -> Cells:
    """A random sample of the cells."""
    order = torch.randperm(len(cells.image), generator=torch.Generator().manual_seed(1))[:count]
    return Cells(*(column[order] for column in cells))


def _sampled(table: dict[str, Cells], count: int, share: float) -> dict[str, Cells]:
    """The cells of a random share of the images."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))[: max(1, round(share * count))]
    return {layer: Cells(*(c[torch.isin(cells.image, order)] for c in cells)) for layer, cells in table.items()}


def _some_images(table: dict[str, Cells], count: int) -> dict[str, Cells]:
    return {layer: Cells(*(c[cells.image < count] for c in cells)) for layer, cells in table.items()}


# --- ours and the peer ------------------------------------------------------------------------------------------------


def _ours(graph: Graph, batch: Callable[[Any], Tensor], table: dict[str, Cells]) -> Iterator[deconv.Projected]:
    """Every cell of the table; images that hold one go through the network together, BATCH at a time."""
    holding = torch.cat([cells.image for cells in table.values()]).unique()
    for numbers in holding.split(BATCH):
        some = {}
        for layer, cells in table.items():
            inside = torch.isin(cells.image, numbers)
            if inside.any():
                within = torch.searchsorted(numbers, cells.image[inside])
                some[layer] = Cells(within, *(column[inside] for column in cells[1:]))
        yield from project_images(graph, batch(numbers.numpy()), some)


def _consume(projected: Iterator[deconv.Projected]) -> None:
    for _ in projected:
        pass


def _peers(network: Network) -> tuple[dict[str, Attribute], str]:
    """Layer -> how the peer projects its cells."""
    cut = {layer: _up_to(network, layer) for layer in LAYERS}
    try:
        import captum
        from captum.attr import Deconvolution
    except ImportError:
        print("captum is not installed: the same arithmetic in plain autograd stands in for it")
        return {layer: _autograd(model) for layer, model in cut.items()}, "autograd (captum is not installed)"
    warnings.filterwarnings("ignore", category=UserWarning)
    methods = {layer: Deconvolution(model) for layer, model in cut.items()}
    run: dict[str, Attribute] = {
        layer: lambda x, cells, method=method: method.attribute(x.requires_grad_(), target=cells)
        for layer, method in methods.items()
    }
    return run, f"captum {captum.__version__}"


def _up_to(network: Network, layer: str) -> nn.Sequential:
    """The network up to the layer's ReLU."""
    names = [name for name, _ in network.named_children()]
    return network[: names.index(layer.replace("conv", "relu")) + 1]


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> Tensor:
        return signal.relu()


def _autograd(model: nn.Sequential) -> Attribute:
    def run(x: Tensor, cells: list[tuple[int, ...]]) -> Tensor:
        y = x.requires_grad_()
        for module in model:
            y = _Rectified.apply(y) if isinstance(module, nn.ReLU) else module(y)
        index = tuple(torch.tensor(cells, device=y.device).T)
        (pixels,) = torch.autograd.grad(y[(torch.arange(len(y), device=y.device), *index)].sum(), x)
        return pixels

    return run


def _peer_run(attribute: Attribute, batch: Callable[[Any], Tensor], cells: Cells, size: int) -> Callable[[], None]:
    def run() -> None:
        for some in zip(*(column.split(size) for column in cells), strict=True):
            attribute(batch(some[0].numpy()), list(zip(*(c.tolist() for c in some[1:]), strict=True)))

    return run


def _best_batch(attribute: Attribute, batch: Callable[[Any], Tensor], cells: Cells) -> tuple[int, float]:
    """The batch size at which the peer is fastest, and its seconds a cell; all are printed."""
    tried = {}
    for size in PEER_BATCHES:
        few = Cells(*(column[: max(4, size)] for column in cells))
        _peer_run(attribute, batch, Cells(*(column[:size] for column in few)), size)()
        tried[size] = _clocked(_peer_run(attribute, batch, few, size)) / len(few.image)
    print("peer, ms a cell by batch size:", {size: round(1e3 * value, 2) for size, value in tried.items()})
    best = min(tried, key=tried.__getitem__)
    return best, tried[best]


def _clocked(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _forward(graph: Graph, layer: str) -> int:
    """Multiply-adds of one image's forward pass up to a layer."""
    return sum(graph.operations[name].multiply_adds() for name in graph.ancestors([graph.activation_of(layer)]))


def _error(graph: Graph, batch: Callable[[Any], Tensor], peers: dict[str, Attribute], table: dict[str, Cells]) -> float:
    """max|difference| / max|reference| over cells of all layers, each on the whole image."""
    worst = scale = 0.0
    for layer, cells in table.items():
        field = receptive_field(graph, layer)
        for number in range(len(cells.image)):
            one = Cells(*(column[number : number + 1] for column in cells))
            x = batch(one.image.numpy())
            ((_, _, activation, projections),) = project_images(graph, x, {layer: one._replace(image=one.image * 0)})
            cell = tuple(int(index) for index in one[1:])
            reference = peers[layer](x.clone(), [cell]).detach()[0] * activation
            top, left, height, width = field.box(*cell[1:])
            margin = max(height, width)
            canvas = nn.functional.pad(torch.zeros_like(reference), (margin,) * 4)
            canvas[:, margin + top :, margin + left :][:, :height, :width] = projections.pixels[0]
            worst = max(worst, float((canvas[:, margin:-margin, margin:-margin] - reference).abs().max()))
            scale = max(scale, float(reference.abs().max()))
    return worst / scale


if __name__ == "__main__":
    main()
