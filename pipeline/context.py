"""What a job is given: the options of every sweep, the run's model and the shards' index, and decoded batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cluster import Decoders, Workers
from pipeline.runs import Model, Run, RunError, named, require_name, runs_model
from pipeline.shards import Index, Sample, Skipped
from pipeline.sources.default import DEFAULT
from pipeline.storage import Location
from zfnet import images
from zfnet.graph import Graph
from zfnet.tracing import trace

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every sweep takes."""

    run: str = "runs/demo"
    """Run directory with a trained or imported model: a local path, s3:// or gs://."""
    data: str = DEFAULT
    """Folder of the shards; the default is drawn if it is missing."""
    index: str | None = None
    """Folder of the shards' index, where it is not in the folder of the shards."""
    split: str = "val"
    """Split of the shards."""
    name: str | None = None
    """Write to results/TABLE-NAME instead of results/TABLE; letters, digits, '.', '_' and '-'."""
    address: str | None = None
    """Ray cluster to join; default the one of `ray job submit`, else an own one."""
    decode: Literal["full", "scaled"] = "full"
    """scaled: JPEGs are decoded at 1/2, 1/4 or 1/8 where that is not below the resized image. Other pixels: another
    data_id, and all tables that are to be joined must be made so."""
    plan: bool = False
    """Print forwards, hours, storage and parts, forecast from one part that is computed here, and do nothing else."""
    max_skipped: float = 0.01
    """Largest share of samples that may be skipped; above it the job ends with exit status 3."""
    attempts: int = 3
    """How often a part may kill its worker, with nothing beside it there, before it is given up in this call."""
    given_up: Literal["retry", "skip"] = "retry"
    """What becomes of such parts. retry: all others are done, the job ends with exit status 1, and the same command
    tries them again. skip: their images are skipped (reason worker_died), and the table is finished without them."""
    device: Literal["cpu", "cuda"] | None = None
    """Where the network runs; default cuda for a worker that gets a GPU, else cpu."""
    log_parts: bool = False
    """Print a line of JSON for each part as well, for log collectors: docs/cluster.md names its fields."""
    workers: Workers = field(default_factory=Workers)
    """What the job asks of the cluster."""
    decoders: Decoders = field(default_factory=Decoders)
    """Reading and decoding on nodes of their own."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_skipped <= 1:
            raise RunError(f"--max-skipped is {self.max_skipped}: give a share from 0 to 1")
        if self.attempts < 1:
            raise RunError(f"--attempts is {self.attempts}: give at least 1")
        if self.decoders.num and self.workers.num == 0:
            raise RunError(
                f"--decoders.num is {self.decoders.num} and --workers.num 0, which is without Ray: decoders need "
                "workers on other nodes"
            )
        require_name(self.name)

    def resolved(self) -> Options:
        """The same with absolute paths: a worker's current folder is not the driver's."""
        run, data = (str(Location.of(path)) for path in (self.run, self.data))
        return replace(self, run=run, data=data, index=self.index and str(Location.of(self.index)))


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded sample: the network's own input pixels and where they come from."""

    sample: Sample
    number: int
    """Place of the key in key order, over the whole split: the sample's name in integer form."""
    pixels: images.Pixels
    crop: images.Crop


@dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that go through the network together: always the same ones, whatever the workers."""

    pictures: list[Picture]
    x: Tensor
    """[N, 3, crop_px, crop_px], normalised, on the device."""


@dataclass(frozen=True, eq=False)
class Context:
    """What an analysis knows, on the driver and in the actors alike."""

    run: Run
    model: Model
    graph: Graph
    index: Index
    split: str
    data_id: str
    config: Any
    analysis: str
    name: str | None
    """Of --name."""
    device: str = "cpu"
    decode: Literal["full", "scaled"] = "full"

    @property
    def table(self) -> str:
        """The analysis's main table, as it is called in the run."""
        return self.named(self.analysis)

    def named(self, table: str) -> str:
        """A table of the analysis, as it is called in the run."""
        return named(table, self.name)

    @property
    def identity(self) -> dict[str, str]:
        """The columns that name the network and the images."""
        return {"model_id": self.model.model_id, "data_id": self.data_id}

    def decides(self, selects: tuple[str, ...]) -> dict[str, Any]:
        """What decides a slice's content, ready for JSON: configuration, network and images.

        Args:
            selects: fields of the configuration that only choose slices.
        """
        config = {name: value for name, value in asdict(self.config).items() if name not in selects}
        decided: dict[str, Any] = json.loads(
            json.dumps({**config, "split": self.split, "decode": self.decode, **self.identity})
        )
        return decided


def open_context(
    options: Options,
    config: Any,
    analysis: str,
    device: str,
    load: Callable[[Run, Any], Model] = runs_model,
    shards: Callable[[], Index] | None = None,
) -> Context:
    """Load a model of the run and the shards' index; or what `shards` gives, after the model: it may draw them."""
    run = Run.at(options.run)
    model = load(run, config)
    index = shards() if shards else Index.load(options.data, options.index)
    if device == "cuda":
        model.network.to(device)
    size = model.preprocessing.crop_px
    graph = trace(model.network, (3, size, size))
    data_id = index.data_id(options.split) + ("" if options.decode == "full" else f"-{options.decode}")
    return Context(
        run, model, graph, index, options.split, data_id, config, analysis, options.name, device, options.decode
    )


def read(context: Context, rows: pa.Table, look: Callable[[Sample, int], T]) -> tuple[list[T], list[Skipped]]:
    """Each sample of these rows as `look` sees it (given its number too), or skipped.

    Args:
        look: may raise BadImage, which makes the sample a skipped one.
    """
    seen: list[T] = []
    skipped: list[Skipped] = []
    for number, sample in zip(rows["number"].to_pylist(), context.index.read(rows), strict=True):
        if isinstance(sample, Skipped):
            skipped.append(sample)
            continue
        try:
            seen.append(look(sample, number))
        except images.BadImage as error:
            skipped.append(Skipped(sample.shard, sample.key, error.reason, error.detail))
    return seen, skipped


def centre_crops(context: Context, state: Any, rows: pa.Table) -> tuple[list[Picture], list[Skipped]]:
    """The run's network's own pixels of these rows."""
    size = context.model.preprocessing.resize_px, context.model.preprocessing.crop_px

    def look(sample: Sample, number: int) -> Picture:
        return Picture(sample, number, *images.input_pixels(sample.image, *size, scaled=context.decode == "scaled"))

    return read(context, rows, look)


def normalised(context: Context, state: Any, pictures: list[Picture]) -> Batch:
    """What the run's network sees of them."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(context.device)
    return Batch(pictures, context.model.preprocessing.normalise(pixels))
