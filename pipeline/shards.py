"""WebDataset shards, read by their index (pipeline.indexing writes it). Nothing else reads a sample of a tar.

No tar reader notices every truncation: a file cut at a member's border reads as a shorter file. So a folder of
shards has an index that says which sample lies where, and every sample of it is either read or accounted for:
samples in = samples out + skipped.

    shards/NAME/index.json         splits, shards (samples, bytes, sha256), classes, and the fields of webdataset's wids
    shards/NAME/samples.parquet    split, shard, key, offset, bytes, label: in index order, by shard name and place
    shards/NAME/classes.txt        line number = class
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import cache, tables
from pipeline.storage import Location, StorageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
MAX_SAMPLE_BYTES = 256 * 2**20
BLOCK = 512
_READ_TOGETHER_BYTES = 16 * 2**20

# What follows the name in the header of a regular file (POSIX.1-1988, or with GNU's mark) without a prefix to it: its
# size and the header's sum.
_PLAIN_HEADER = re.compile(
    rb"(?:[0-7]{7}\0){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 0.{100}ustar(?:\x0000|  \0).{64}"
    rb"(?:[0-7]{7}\0|\0{8}){2}\0",
    re.DOTALL,
)

SAMPLES = tables.schema(
    "samples",
    row="a sample of the shards",
    file="",
    key=("split", "key"),
    columns=[
        tables.column("split", pa.string(), "Split: the shard's file name up to the last '-'."),
        tables.SHARD,
        tables.KEY,
        tables.column("offset", pa.int64(), "Byte at which the sample's first member starts in its shard."),
        tables.column("bytes", pa.int64(), "Bytes from there to the end of its last member."),
        tables.LABEL,
    ],
)


class BadShards(ValueError):
    """Shards or their index cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Sample:
    """One sample as read: its members by suffix, lower case (jpg, cls, json, mask.png, ...)."""

    key: str
    shard: str
    label: int | None
    members: dict[str, bytes]

    @property
    def image(self) -> bytes:
        """The bytes of its image, the first that there is of IMAGE_SUFFIXES."""
        return next(self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members)


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be read, and why."""

    shard: str
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds."""

    folder: Location
    """Where the shards lie; the index may lie elsewhere."""
    classes: tuple[str, ...]
    shards: dict[str, list[dict[str, Any]]]
    """For each split its shards in index order: file, samples, bytes, sha256."""
    samples: pa.Table = field(repr=False)
    """All samples (SAMPLES), in index order."""

    @classmethod
    def load(cls, data: str | Location, index: str | Location | None = None) -> Index:
        """The index of the shards in `data`; `index` is the folder that holds it where it is not `data`.

        Raises: BadShards where it is missing, damaged or does not fit its samples.
        """
        where = Location.of(index or data)
        if not (where / "index.json").exists():
            raise BadShards(
                f"there is no index.json in {where}: make one with "
                f"`python jobs/shards.py index {Location.of(data)} --out {where}`"
            )
        try:
            found = json.loads((where / "index.json").read())
            shards = {split: list(entry["shards"]) for split, entry in found["splits"].items()}
            samples = tables.read(where / "samples.parquet").select(SAMPLES.names)
            classes = tuple(str(name) for name in found["classes"])
            folder = Location.of(found["folder"]) if found.get("folder") and index is None else Location.of(data)
        except (KeyError, TypeError, AttributeError, ValueError, FileNotFoundError, pa.ArrowException) as error:
            raise BadShards(
                f"the index in {where} is damaged ({error!r}): make it again with jobs/shards.py index"
            ) from None
        expected = sum(int(shard["samples"]) for listed in shards.values() for shard in listed)
        if samples.num_rows != expected:
            raise BadShards(
                f"index.json in {where} lists {expected} samples and samples.parquet {samples.num_rows}: "
                "make the index again with jobs/shards.py index"
            )
        return cls(folder, classes, shards, samples)

    def split(self, name: str) -> pa.Table:
        """The samples of one split, in index order, with `number`: the place of each key in key order.

        Raises: BadShards for an unknown or empty split, or a key that occurs twice.
        """
        self._require(name)
        rows = self.samples.filter(pc.equal(self.samples["split"], name))
        if rows.num_rows == 0:
            raise BadShards(f"the split {name!r} in {self.folder} holds no samples: give shards with images")
        order = np.asarray(pc.sort_indices(rows["key"]))
        if len(pc.unique(rows["key"])) != rows.num_rows:
            raise BadShards(f"the split {name!r} in {self.folder} holds a key twice; {_first_repeated(rows['key'])}")
        number = np.empty(rows.num_rows, dtype=np.int64)
        number[order] = np.arange(rows.num_rows)
        return rows.append_column("number", pa.array(number))

    def _require(self, split: str) -> None:
        if split not in self.shards:
            raise BadShards(f"there is no split {split!r} in {self.folder}: it has {', '.join(self.shards) or 'none'}")

    def data_id(self, split: str) -> str:
        """Identity of a split's images: 16 hex digits over its shards' names, sizes and sha256, and the classes; where
        samples were chosen of them (`write_choice`), over those as well."""
        self._require(split)
        named = ("file", "samples", "bytes", "sha256", "chosen")
        shards = [[s[name] for name in named if name in s] for s in self.shards[split]]
        return hashlib.sha256(json.dumps([shards, self.classes]).encode()).hexdigest()[:16]

    def label_name(self, label: int | None) -> str | None:
        """The name of a class; None where there is none."""
        return self.classes[label] if label is not None and 0 <= label < len(self.classes) else None

    @cached_property
    def splits(self) -> dict[str, int]:
        """Samples of each split."""
        return {split: sum(int(s["samples"]) for s in listed) for split, listed in self.shards.items()}

    def read(self, rows: pa.Table) -> Iterator[Sample | Skipped]:
        """Exactly one Sample or Skipped for each row of SAMPLES, in order; rows of one shard at a time.

        What is wrong with the bytes is skipped; storage is tried again from the start, then raises StorageError.
        """
        for run in _runs(rows.select(["shard", "key", "offset", "bytes", "label"]).to_pylist()):
            start = run[0]["offset"]
            data = self._bytes(run[0]["shard"], start, run[-1]["offset"] + run[-1]["bytes"] - start)
            begins = [row["offset"] - start for row in run]
            # All at once, not one between two that are decoded: twice as fast, with its code in the core's cache.
            yield from [_parse(row, data[at : at + row["bytes"]]) for at, row in zip(begins, run, strict=True)]

    def _bytes(self, shard: str, start: int, length: int) -> bytes:
        """Bytes of a shard, from the node's cache where there is one; fewer where the shard ends early.

        Too many at once are not read (see _parse).
        """
        if length > MAX_SAMPLE_BYTES:
            return b""
        location = self.folder / shard
        kept = cache.of_this_node() if location.local is None else None
        try:
            copy = kept.open(location, *self.identities[shard]) if kept and shard in self.identities else None
            if copy is None:
                return location.read_range(start, length)
        except FileNotFoundError as error:
            raise StorageError(f"{error}, though the index lists it: bring it back or make the index again") from None
        with copy:
            return os.pread(copy.fileno(), length, start)

    @cached_property
    def identities(self) -> dict[str, tuple[int, str]]:
        """Bytes and sha256 of each shard."""
        return {s["file"]: (int(s["bytes"]), str(s["sha256"])) for listed in self.shards.values() for s in listed}


def with_label(rows: pa.Table, classes: int) -> tuple[pa.Table, list[Skipped]]:
    """The rows of Index.split that training and evaluation can use, and the others with the reason."""
    usable, skipped = [], []
    for number, row in enumerate(rows.select(["shard", "key", "label"]).to_pylist()):
        if row["label"] is None:
            skipped.append(Skipped(row["shard"], row["key"], "no_label", "it has no member .cls with a class number"))
        elif row["label"] >= classes:
            detail = f"label {row['label']}, and there are {classes} classes"
            skipped.append(Skipped(row["shard"], row["key"], "label_out_of_range", detail))
        else:
            usable.append(number)
    return rows.take(pa.array(usable, type=pa.int64())), skipped


def _first_repeated(keys: pa.ChunkedArray) -> str:
    counts = pc.value_counts(keys)
    repeated = next(entry for entry in counts.to_pylist() if entry["counts"] > 1)
    return f"key {repeated['values']!r} occurs {repeated['counts']} times: rename or remove all but one"


def _runs(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows that are read together: of one shard, one after another, at most _READ_TOGETHER_BYTES."""
    run: list[dict[str, Any]] = []
    for row in rows:
        if run:
            last = run[-1]
            adjacent = row["shard"] == last["shard"] and row["offset"] == last["offset"] + last["bytes"]
            if not adjacent or row["offset"] + row["bytes"] - run[0]["offset"] > _READ_TOGETHER_BYTES:
                yield run
                run = []
        run.append(row)
    if run:
        yield run


def _parse(row: dict[str, Any], data: bytes) -> Sample | Skipped:
    shard, key, size = row["shard"], row["key"], row["bytes"]
    if size > MAX_SAMPLE_BYTES:
        return Skipped(shard, key, "too_large", f"{size} bytes; at most {MAX_SAMPLE_BYTES} are read")
    if len(data) < size:
        return Skipped(shard, key, "truncated", f"the shard ends after {len(data)} of the sample's {size} bytes")
    members: dict[str, bytes] = {}
    try:
        for name, start, length in _plain_files(data) or _files(data):
            split = split_name(name)
            if split is not None and split[0] == key:
                members.setdefault(split[1], data[start : start + length])
    except (tarfile.TarError, ValueError, OverflowError) as error:
        return Skipped(shard, key, "corrupt_tar", str(error))
    if not members:
        return Skipped(shard, key, "corrupt_tar", "no member of this key where the index says it lies")
    if not any(suffix in members for suffix in IMAGE_SUFFIXES):
        return Skipped(
            shard, key, "no_image", f"it has {', '.join(sorted(members))}; one of {IMAGE_SUFFIXES} is needed"
        )
    return Sample(key, shard, row["label"], members)


def _files(data: bytes) -> list[tuple[str, int, int]]:
    """Name, first byte and length of every regular file of a tar, whatever its dialect.

    Raises: tarfile.TarError, ValueError, OverflowError.
    """
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", errors="surrogateescape") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


def _plain_files(data: bytes) -> list[tuple[str, int, int]] | None:
    """What `_files` says, in an eighth of the time; None unless all headers are sound, and plain.

    Not plain are long names, directories, large numbers and extensions of any kind.
    """
    files = []
    place = 0
    while place < len(data):
        found = _PLAIN_HEADER.match(data, place + 100)
        if not found:
            return None
        size, total = found.groups()
        # The header's bytes are summed with blanks in the place of the sum, of which one is there.
        if _sum(data, place) - sum(total) + 7 * ord(" ") != int(total, 8):
            return None
        name = data[place : place + 100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        length = int(size, 8)
        start = place + BLOCK
        place = start + -(-length // BLOCK) * BLOCK
        files.append((name, start, length))
    return files if place == len(data) else None


def _sum(data: bytes, start: int) -> int:
    """The sum of a block's bytes. The lower half of Adler-32 is a sum modulo 65521, beyond what half a block has."""
    middle, end = start + BLOCK // 2, start + BLOCK
    return (zlib.adler32(data[start:middle], 0) & 0xFFFF) + (zlib.adler32(data[middle:end], 0) & 0xFFFF)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member's name, webdataset's rule: the suffix starts at the file name's first dot.

    None where there is no key or no suffix. Bytes that are not UTF-8 become U+FFFD.
    """
    folder, slash, file = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and suffix else None
