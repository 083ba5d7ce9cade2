"""From a source of images to a folder of shards, whole and repeatable: the same source and seed give the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import webdataset as wds

from pipeline.indexing import Scan, scan, split_of, write_index
from pipeline.shards import BadShards, Index
from pipeline.storage import Location, cannot_write

_STAGING = "shards-"


class Source(Protocol):
    """A set of images with, perhaps, labels. Samples are made one at a time, in any order and process."""

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes; None where images have no labels."""

    @property
    def splits(self) -> dict[str, int]:
        """Samples of each split."""

    def about(self) -> dict[str, Any]:
        """What decides the content, for index.json: two sources with the same description are the same."""

    def sample(self, split: str, number: int) -> dict[str, Any]:
        """The sample as webdataset knows it: `__key__`, image bytes, `cls` (int), `json` (dict), further bytes."""


def write_shards(source: Source, out: str, *, seed: int = 0, samples_per_shard: int = 1000) -> Index:
    """Write a source as shards with an index, order shuffled by `seed`. A finished folder is left as it is.

    Raises: BadShards where the folder holds shards of another source, or a key that occurs twice.
    """
    target = Location.of(out)
    about = {"source": source.about(), "seed": seed, "samples_per_shard": samples_per_shard}
    if (target / "index.json").exists():
        found = json.loads((target / "index.json").read())
        if {name: found.get(name) for name in about} != about:
            raise BadShards(
                f"{target} already holds shards of another source: it was made with "
                f"{ {name: found.get(name) for name in about} }, now asked for {about}; give another --out"
            )
        return Index.load(target)
    if not sum(source.splits.values()):
        raise BadShards(f"the source {source.about()} has no images: nothing to write")
    with cannot_write(target):
        if target.local is not None:
            target.local.mkdir(parents=True, exist_ok=True)
            target.clear_temporary(_STAGING)  # what a killed writer left
        with tempfile.TemporaryDirectory(prefix=f".tmp-{_STAGING}", dir=target.local) as staging:
            scans = [
                found
                for split in source.splits
                for found in _write_split(source, split, seed, samples_per_shard, Path(staging), target)
            ]
    written = {split: sum(len(s.rows) for s in scans if split_of(s.file) == split) for split in source.splits}
    if written != source.splits:
        raise BadShards(f"{source.splits} images were to be written and {written} are there: do two have the same key?")
    return write_index(scans, target, source.classes, about=about)


def _write_split(
    source: Source, split: str, seed: int, samples_per_shard: int, staging: Path, target: Location
) -> list[Scan]:
    """Write the shards of a split; each is moved to its place as soon as it is whole."""
    order = np.random.default_rng([seed, 0x5A4D]).permutation(source.splits[split]).tolist()
    scans: list[Scan] = []
    if not order:
        return scans

    def move(name: str) -> None:
        scans.append(scan(Location.of(name)))
        with (target / Path(name).name).whole_file() as file, Path(name).open("rb") as shard:
            shutil.copyfileobj(shard, file)
        Path(name).unlink()

    pattern = str(staging / f"{split}-%06d.tar")
    with wds.ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, encoder=False, mtime=0, post=move) as writer:
        for sample in _made(source, split, order):
            writer.write(sample)
    return scans


def _made(source: Source, split: str, order: list[int]) -> Iterator[dict[str, Any]]:
    """The samples in order, made by all cores where there are enough to pay for starting processes."""
    cores = os.cpu_count() or 1
    if cores == 1 or len(order) < 500:
        yield from (_encoded(source, split, number) for number in order)
        return
    with multiprocessing.get_context("spawn").Pool(cores, _receive, (source, split)) as pool:
        yield from pool.imap(_make, order, chunksize=16)


_received: list[tuple[Source, str]] = []
"""What a process of the pool makes samples of: sent to it once."""


def _receive(source: Source, split: str) -> None:
    _received[:] = [(source, split)]


def _make(number: int) -> dict[str, Any]:
    return _encoded(*_received[0], number)


def _encoded(source: Source, split: str, number: int) -> dict[str, Any]:
    """A sample with every member as bytes."""
    sample = source.sample(split, number)
    return {name: value if name == "__key__" else _bytes(value) for name, value in sample.items()}


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return str(value).encode()
    return json.dumps(value, ensure_ascii=False).encode()
