"""The sweep of conv1-5 against the limit that decoding and the network's forward pass set, and against zennit-crp.

python -m benchmarks.sweep [--quick] [--threads 2]

The sweep is clocked in the actor, from the first read to the last commit; its start-up is told apart. On a CPU decoding
and forward share the cores: the limit is 1 / (1 / decode + 1 / forward), both measured alone in the same run, on
some of the images, with the same threads and layout of the weights, before and after each sweep. `ratio` is the median
of the rounds' shares of their limits, the smaller of ZFNet at 224 px and zfnet_small at 64 px.
zennit-crp's FeatureVisualization does the same layers of the same images if it can be imported (pip install
zennit-crp); it runs the whole network and a backward pass as well.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipeline import tables
from pipeline.actor import PartActor
from pipeline.analyses import top9
from pipeline.cluster import PARTS_AT_ONCE, Resources
from pipeline.context import Options
from pipeline.indexing import scan, write_index
from pipeline.runs import Run
from pipeline.shards import Sample
from pipeline.storage import Location
from zfnet import images, models
from zfnet.images import Preprocessing

ROOT = Path(__file__).resolve().parents[1]
DATA = (
    "../shared/data/imagenet-samples/val-000000.tar",
    "../shared/data/caltech101/val-000000.tar",
    "../shared/data/caltech101/val-000001.tar",
)
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
HELD = 256
"""Images whose bytes and inputs are held in memory for decoding and forward alone."""


def write_run(folder: Path, architecture: str) -> str:
    """A run with a network of random weights whose activations have a sensible size in every layer."""
    torch.manual_seed(0)
    network = models.build(architecture, classes=1000)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.normal_(module.bias, std=0.1)
    preprocessing = Preprocessing(
        resize_px=network.resize_px, crop_px=network.input_px, mean=torch.full((3, 1, 1), 120.0)
    )
    classes = tuple(map(str, range(1000)))
    Run.at(folder / architecture).save_model(
        network, architecture=architecture, classes=classes, preprocessing=preprocessing, about={}
    )
    return str(folder / architecture)


def write_data(folder: Path, shards: Iterable[str], images_: int | None) -> str:
    """An index of these shards, side by side under one folder: of their first images where a number is given."""
    folder.mkdir()
    scans = []
    for number, shard in enumerate(shards):
        (folder / f"val-{number:06d}.tar").symlink_to((ROOT / shard).resolve())
        found = scan(Location.of(folder / f"val-{number:06d}.tar"))
        left = None if images_ is None else images_ - sum(len(s.rows) for s in scans)
        for row in found.rows:
            row["label"] = None
        scans.append(type(found)(found.file, found.bytes, found.sha256, found.rows[:left], found.damage))
    write_index([s for s in scans if s.rows], Location.of(folder), None)
    return str(folder)


def clock(action: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def spent(action: Callable[[], Any], images_: int) -> np.ndarray:
    """Seconds, and seconds of this process's processors, that it takes for each of these images."""
    busy = time.process_time()
    seconds = clock(action)
    return np.array([seconds, time.process_time() - busy]) / images_


def in_threads(threads: int, action: Callable[[Any], Any], items: list[Any]) -> Callable[[], Any]:
    """The action on all items, in as many threads, each of one torch thread: as the sweep's actor works."""

    def run() -> None:
        with ThreadPoolExecutor(threads) as pool, torch.inference_mode():
            list(pool.map(lambda item: _inferring(action, item), items))

    return run


def _inferring(action: Callable[[Any], Any], item: Any) -> Any:
    with torch.inference_mode():  # a setting of the thread
        return action(item)


@dataclass
class Rates:
    """Medians over the rounds: images per second, the share of each round's limit; seconds of start-up."""

    start_up: float
    rounds: int
    sweep: float
    decode: float
    forward: float
    limit: float
    share: float
    busy_share: float
    """The same in processor time, where neither waiting nor, much, other work on the machine shows."""
    error: float


def start(run: str, data: str, options: argparse.Namespace) -> PartActor:
    """The actor that does the sweep of LAYERS."""
    config = top9.Config(layers=LAYERS, batch_size=options.batch_size)
    resources = Resources(1, options.threads, 0.0)
    asked = Options(run=run, data=data)
    return PartActor(top9.__name__, asked, config, list(LAYERS), resources, session="bench", token=None)


def measure(run: str, data: str, options: argparse.Namespace) -> Rates:
    """The sweep, decoding alone and the forward pass alone, in turn until the time is over."""
    started = time.perf_counter()
    actor = start(run, data, options)
    start_up = time.perf_counter() - started
    context = actor.work.context
    rows = context.index.split("val")
    held = min(HELD, rows.num_rows) // (2 * options.threads) * (2 * options.threads)
    chosen = rows.take(torch.linspace(0, rows.num_rows - 1, held).long().numpy())
    data_bytes = [sample.image for sample in context.index.read(chosen) if isinstance(sample, Sample)]
    size = context.model.preprocessing.resize_px, context.model.preprocessing.crop_px
    per = min(options.batch_size, held // options.threads)
    groups = [data_bytes[i : i + per] for i in range(0, held, per)]
    inputs = [context.model.preprocessing.normalise(decode(group, size)) for group in groups]
    nodes = [context.graph.activation_of(layer) for layer in LAYERS]
    decoding = in_threads(options.threads, lambda group: decode(group, size), groups)
    forward = in_threads(options.threads, lambda x: len(context.graph.run(x, nodes)), inputs)
    _sweep(actor)
    error = _error(actor, context, chosen["number"].to_numpy(), inputs)
    actor.work.location.delete()
    rounds: list[tuple[float, ...]] = []
    while time.perf_counter() - started < options.seconds or len(rounds) < 3:
        # [before and after the sweep, seconds and processor seconds of an image]
        decoded, forwarded = [spent(decoding, held)], [spent(forward, held)]
        swept = spent(lambda: _sweep(actor), rows.num_rows)
        decoded.append(spent(decoding, held))
        forwarded.append(spent(forward, held))
        actor.work.location.delete()
        alone = np.mean(decoded, axis=0), np.mean(forwarded, axis=0)
        shares = sum(alone) / swept
        rounds.append((1 / swept[0], *(1 / some[0] for some in alone), 1 / sum(alone)[0], *shares))
    actor.close()
    return Rates(start_up, len(rounds), *(median(column) for column in zip(*rounds, strict=True)), error)


def decode(group: list[bytes], size: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.stack([images.input_pixels(data, *size)[0] for data in group]))


def _sweep(actor: PartActor) -> None:
    """All parts, so many at once as a job without Ray asks for."""
    with ThreadPoolExecutor(PARTS_AT_ONCE) as calls:
        for done in calls.map(actor, [{"part": [number]} for number in range(len(actor.work.parts))]):
            assert not done["error"][0], done["error"][0]


def _error(actor: PartActor, context: Any, numbers: np.ndarray, inputs: list[torch.Tensor]) -> float:
    """The maxima that the parts hold against those of the network's own modules, over the images that are held."""
    found = {layer: np.empty((0, 0)) for layer in LAYERS}
    for layer in LAYERS:
        of_number = {}
        for number in range(len(actor.work.parts)):
            part = tables.read_equal(actor.work.part(number), ["number", "maxima"], "layer", layer)
            swept = part["number"][0].values.to_numpy()
            of_number |= dict(zip(swept, part["maxima"][0].values.to_numpy().reshape(len(swept), -1), strict=True))
        found[layer] = np.stack([of_number[number] for number in numbers])
    worst = 0.0
    with torch.inference_mode():
        for start, x in zip(np.cumsum([0, *map(len, inputs)]), inputs, strict=False):
            for name, module in context.model.network.named_children():
                x = module(x)
                layer = name.replace("relu", "conv")
                if name.startswith("relu") and layer in found:
                    difference = np.abs(x.amax((2, 3)).numpy() - found[layer][start : start + len(x)]).max()
                    worst = max(worst, float(difference / found[layer].max()))
                if name == "relu5":
                    break
    return worst


def crp(run: str, data: str, options: argparse.Namespace) -> tuple[dict[int, float], float] | None:
    """Images per second of zennit-crp for each batch size, and of the sweep of the same images in turn with it.

    None where it is not installed.
    """
    try:
        from crp.attribution import CondAttribution
        from crp.concepts import ChannelConcept
        from crp.visualization import FeatureVisualization
    except ImportError:
        print("zennit-crp is not installed: that comparison is left out (pip install zennit-crp)")
        return None
    actor = start(run, data, options)
    context = actor.work.context
    preprocessing = context.model.preprocessing
    rows = context.index.split("val")
    data_bytes = [sample.image for sample in context.index.read(rows) if isinstance(sample, Sample)]

    class Pictures:
        def __len__(self) -> int:
            return len(data_bytes)

        def __getitem__(self, place: int) -> tuple[torch.Tensor, int]:
            size = preprocessing.resize_px, preprocessing.crop_px
            return preprocessing.normalise(decode([data_bytes[place]], size))[0], 0

    rates, swept = {}, []
    for batch in (8, 32) if options.quick else (8, 16, 32, 64):
        swept.append(len(data_bytes) / clock(lambda: _sweep(actor)))
        actor.work.location.delete()
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), _quiet():
            attribution = CondAttribution(context.model.network)
            layers = {layer: ChannelConcept() for layer in LAYERS}
            peer = FeatureVisualization(attribution, Pictures(), layers, max_target="max", path=folder)
            rates[batch] = len(data_bytes) / clock(
                lambda peer=peer, batch=batch: peer.run(None, 0, len(data_bytes), batch, checkpoint=10**6)
            )
        torch.set_num_threads(1)
    actor.close()
    return rates, median(swept)


def _quiet() -> contextlib.redirect_stderr[io.StringIO]:
    return contextlib.redirect_stderr(io.StringIO())  # its progress bars


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds; under 3 minutes")
    parser.add_argument("--data", nargs="+", default=DATA, help="tars; relative to the project")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side")
    parser.add_argument("--batch-size", type=int, default=top9.Config().batch_size)
    options = parser.parse_args()
    options.seconds = 40 if options.quick else 70
    torch.set_num_threads(1)
    found: dict[str, Rates] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data", options.data, 512 if options.quick else None)
        for architecture in ("zfnet", "zfnet_small"):
            run = write_run(folder, architecture)
            found[architecture] = rates = measure(run, data, options)
            print(
                f"{architecture}: decode {rates.decode:.1f}, forward {rates.forward:.1f}, limit {rates.limit:.1f}, "
                f"sweep {rates.sweep:.1f} images/s: {rates.share:.3f} of the limit, "
                f"{rates.busy_share:.3f} in processor time ({rates.rounds} rounds); "
                f"start-up {rates.start_up:.1f} s; error {rates.error:.1e}",
                flush=True,
            )
        peer = crp(
            str(folder / "zfnet"), write_data(folder / "peer", options.data, 64 if options.quick else 137), options
        )
    times = None
    if peer:
        tried, ours = peer
        times = ours / max(tried.values())
        print(
            "zennit-crp (forward and backward, whole network), images/s by batch size: "
            + ", ".join(f"{rate:.1f} at {batch}" for batch, rate in tried.items())
        )
        print(f"the sweep of zfnet does {ours:.1f} of the same images, {times:.1f} times its best")
    print(
        json.dumps(
            {
                "ratio": min(rates.share for rates in found.values()),
                "error": max(rates.error for rates in found.values()),
                "times_zennit_crp": times,
                "threads": options.threads,
                **{name: vars(rates) for name, rates in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
