"""WebDataset shards: their index, and the one reader. Nothing else in the project opens a tar for reading.

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
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import cache, tables
from pipeline.storage import Location, StorageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
MAX_SAMPLE_BYTES = 256 * 2**20
_LONGEST_HEADER = 2**20  # bytes that a long name or a pax header goes on for
_BLOCK = 512
_MOST_UNNAMED_CLASSES = 100_000
_READ_TOGETHER_BYTES = 16 * 2**20
_NAME = re.compile(
    r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL
)  # webdataset's rule: the suffix starts at the first dot

# What follows the name in the header of a regular file (POSIX.1-1988, or with GNU's mark) without a prefix to it.
_PLAIN_HEADER = re.compile(
    rb"(?:[0-7]{7}\0){3}(?P<size>[0-7]{11})[\0 ][0-7]{11}[\0 ](?P<sum>[0-7]{6})\0 0.{100}ustar(?:\x0000|  \0).{64}"
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
            for row in run:
                begin = row["offset"] - start
                yield _parse(row, data[begin : begin + row["bytes"]])

    def _bytes(self, shard: str, start: int, length: int) -> bytes:
        """Bytes of a shard, from the node's cache where there is one; fewer where the shard ends early.

        Too many at once are not read (see _parse).
        """
        if length > MAX_SAMPLE_BYTES:
            return b""
        location = self.folder / shard
        kept = cache.of_this_node() if location.local is None else None
        try:
            copy = kept.open(location, *self._identities[shard]) if kept and shard in self._identities else None
            if copy is None:
                return location.read_range(start, length)
        except FileNotFoundError as error:
            raise StorageError(f"{error}, though the index lists it: bring it back or make the index again") from None
        with copy:
            return os.pread(copy.fileno(), length, start)

    @cached_property
    def _identities(self) -> dict[str, tuple[int, str]]:
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
            split = _split_name(name)
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
    """What `_files` says, in a quarter of the time; None unless all headers are sound, and plain.

    Not plain are long names, directories, large numbers and extensions of any kind.
    """
    files = []
    place = 0
    while place < len(data):
        found = _PLAIN_HEADER.match(data, place + 100)
        # The header's bytes are summed with blanks in the place of the sum, of which one is there.
        if not found or sum(data[place : place + _BLOCK]) - sum(found["sum"]) + 7 * ord(" ") != int(found["sum"], 8):
            return None
        name = data[place : place + 100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        length = int(found["size"], 8)
        start = place + _BLOCK
        place = start + -(-length // _BLOCK) * _BLOCK
        files.append((name, start, length))
    return files if place == len(data) else None


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member's name; None where it has no suffix. Bytes that are not UTF-8 become U+FFFD."""
    match = _NAME.match(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    return (match[1], match[2].lower()) if match else None


@dataclass(frozen=True)
class Scan:
    """What one tar holds."""

    file: str
    bytes: int
    sha256: str
    rows: list[dict[str, Any]]
    damage: str | None


def scan(location: Location) -> Scan:
    """Walk a shard once. Damage of any kind is found: the tar must end with its end-of-archive mark."""
    rows: list[dict[str, Any]] = []
    try:
        with _at_hand(location) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
            file.seek(0)
            damage = _walk(file, size, rows)
    except FileNotFoundError:
        raise BadShards(f"there is no shard {location}") from None
    except OSError as error:
        raise StorageError(f"cannot read {location}: {error}") from error
    for row in rows:
        row.update(split=split_of(location.name), shard=location.name)
    return Scan(location.name, size, sha256, rows, damage)


@contextmanager
def _at_hand(location: Location) -> Iterator[Any]:
    """The file itself, or a copy of it on this disk: a walk asks for a few bytes thousands of times."""
    if location.local is not None:
        with location.local.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        location.download(copy, tempfile.gettempdir())
        copy.seek(0)
        yield copy


def split_of(file: str) -> str:
    """Split of a shard: its file name up to the last '-', or its stem."""
    stem = file.removesuffix(".tar")
    return stem.rpartition("-")[0] or stem


class _Bounded:
    """A file for tarfile, which reads a long name or a pax header whole, however large it claims to be."""

    def __init__(self, file: Any) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        """Raises: tarfile.ReadError for more than a header has."""
        if size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"the header at byte {self.tell() - _BLOCK} claims to go on for {size} bytes")
        read: bytes = self._read(size)
        return read


def _walk(file: Any, size: int, rows: list[dict[str, Any]]) -> str | None:
    """Append a row for each sample of the tar; returns what is wrong with the file, or None."""
    if size == 0:
        return "the file is empty"
    try:
        with tarfile.open(fileobj=cast(Any, _Bounded(file)), mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
                if end > size:
                    return f"it ends inside {member.name!r}, at byte {size} of at least {end}"
                name = _split_name(member.name)
                if member.isreg() and name is not None:
                    _add_member(file, member, name, end, rows)
            file.seek(tar.offset)
            if file.read(2 * _BLOCK) != bytes(2 * _BLOCK):
                return f"there is no end-of-archive mark at byte {tar.offset} of {size}: it is cut or damaged there"
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        return str(error)
    return None


def _add_member(
    file: Any, member: tarfile.TarInfo, name: tuple[str, str], end: int, rows: list[dict[str, Any]]
) -> None:
    key, suffix = name
    if not rows or rows[-1]["key"] != key:
        rows.append({"key": key, "offset": member.offset, "bytes": 0, "label": None})
    rows[-1]["bytes"] = end - rows[-1]["offset"]
    if suffix == "cls" and member.size <= _BLOCK:
        place = file.tell()
        file.seek(member.offset_data)
        text = file.read(member.size).strip()
        file.seek(place)
        rows[-1]["label"] = int(text) if re.fullmatch(rb"\d{1,9}", text) else None


def write_index(
    scans: Iterable[Scan],
    out: Location,
    classes: list[str] | None,
    folder: Location | None = None,
    about: dict[str, Any] | None = None,
) -> Index:
    """Write the index of scanned shards, `index.json` last; shards are ordered by file name, whatever order is given.

    Args:
        scans: one for each shard.
        out: folder for the index.
        classes: names of the classes; None: their numbers.
        folder: where the shards lie, if not in `out`.
        about: further fields of index.json (how the shards were made).

    Raises: BadShards for no shards, no samples or a key that occurs twice in a split.
    """
    ordered = sorted(scans, key=lambda s: s.file)
    rows = [row for found in ordered for row in found.rows]
    if not rows:
        raise BadShards(f"given {len(ordered)} shards without any sample: give tars with images named KEY.jpg")
    if len({found.file for found in ordered}) != len(ordered):
        raise BadShards("two shards have the same file name: rename one, names must differ within an index")
    samples = tables.conform({name: [row[name] for row in rows] for name in SAMPLES.names}, SAMPLES)
    if classes is None:
        classes = _numbered(pc.max(samples["label"]).as_py())
    splits: dict[str, Any] = {}
    for found in ordered:
        entry = splits.setdefault(split_of(found.file), {"samples": 0, "shards": []})
        entry["samples"] += len(found.rows)
        shard = {"file": found.file, "samples": len(found.rows), "bytes": found.bytes, "sha256": found.sha256}
        entry["shards"].append(shard | ({"damage": found.damage} if found.damage else {}))
    wids = [{"url": f.file, "nsamples": len(f.rows), "filesize": f.bytes} for f in ordered]
    index = {
        **(about or {}),
        "folder": str(folder) if folder is not None else None,
        "classes": classes,
        "splits": splits,
        "wids_version": 1,
        "shardlist": wids,
    }
    made = Index(folder or out, tuple(classes), {k: v["shards"] for k, v in splits.items()}, samples)
    for split in splits:
        made.split(split)  # refuses repeated keys before anything is written
    tables.write(samples, out / "samples.parquet")
    (out / "classes.txt").write("".join(f"{_one_line(name)}\n" for name in classes).encode())
    (out / "index.json").write(json.dumps(index, indent=1).encode())
    return made


def write_choice(index: Index, chosen: dict[str, npt.NDArray[np.int64]], out: Location) -> None:
    """Write an index of some samples of an index, in splits of their own; the shards stay where they are.

    Args:
        index: the samples to choose from.
        chosen: split of the new index -> rows of `index.samples`, in any order.
        out: folder for the index.

    Raises: BadShards for a key that occurs twice in a new split.
    """
    known = {shard["file"]: shard for some in index.shards.values() for shard in some}
    pieces = [SAMPLES.empty_table()]
    listed: dict[str, list[dict[str, Any]]] = {}
    for split, places in chosen.items():
        rows = index.samples.take(pa.array(np.sort(places)))
        rows = tables.conform({**{name: rows[name] for name in SAMPLES.names}, "split": [split] * len(rows)}, SAMPLES)
        keys: dict[str, list[str]] = {}
        for file, key in zip(rows["shard"].to_pylist(), rows["key"].to_pylist(), strict=True):
            keys.setdefault(file, []).append(key)
        listed[split] = [
            {**known[file], "samples": len(some), "chosen": hashlib.sha256(json.dumps(some).encode()).hexdigest()}
            for file, some in keys.items()
        ]
        pieces.append(rows)
    samples = pa.concat_tables(pieces)
    made = Index(index.folder, index.classes, listed, samples)
    for split in listed:
        made.split(split)  # refuses repeated keys before anything is written
    tables.write(samples, out / "samples.parquet")
    splits = {split: {"samples": made.splits[split], "shards": some} for split, some in listed.items()}
    found = {"folder": str(index.folder), "classes": list(index.classes), "splits": splits}
    (out / "index.json").write(json.dumps(found, indent=1).encode())


def _numbered(highest: int | None) -> list[str]:
    """Classes without names: their numbers."""
    if highest is not None and highest >= _MOST_UNNAMED_CLASSES:
        raise BadShards(f"the highest label is {highest}, and there is no classes.txt: name the classes, one a line")
    return [str(label) for label in range(0 if highest is None else highest + 1)]


def _one_line(name: str) -> str:
    return " ".join(name.split())


def _tars(location: Location) -> list[Location]:
    """A shard, or those of a folder."""
    if (location.local is not None and not location.local.is_dir()) or location.name.endswith(".tar"):
        return [location]
    return [location / name for name in location.names() if name.endswith(".tar")]


def index_shards(shards: list[str], out: str, *, classes: str | None, accept_damaged: bool) -> Index:
    """Index shards that came from elsewhere.

    Args:
        shards: paths or URLs of tars of one folder, or of the folder.
        out: folder for the index.
        classes: a file with a class name a line; default classes.txt beside the shards, where there is one.
        accept_damaged: index what can be read of damaged shards instead of refusing them.

    Raises: BadShards, naming every damaged shard and what is wrong with it.
    """
    locations = [found for shard in shards for found in _tars(Location.of(shard))]
    if not locations:
        raise BadShards(
            f"given no shards{' in ' * bool(shards)}{', '.join(shards)}: name the tar files to index, or their folder"
        )
    folders = {str(location.parent) for location in locations}
    if len(folders) > 1:
        raise BadShards(f"the shards lie in {len(folders)} folders ({', '.join(sorted(folders))}): index one at a time")
    scans = [scan(location) for location in locations]
    damaged = [f"{found.file}: {found.damage} ({len(found.rows)} samples before it)" for found in scans if found.damage]
    if damaged and not accept_damaged:
        raise BadShards(
            "damaged shards, nothing was written:\n  " + "\n  ".join(damaged) + "\nReplace them, or give "
            "--accept-damaged to index what can be read of them"
        )
    folder = locations[0].parent
    names = Location.of(classes) if classes else folder / "classes.txt"
    try:
        listed = names.read().decode().splitlines() if classes or names.exists() else None
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise BadShards(
            f"{names} cannot be read ({error}): give a UTF-8 file with the name of a class on each line"
        ) from None
    target = Location.of(out)
    return write_index(scans, target, listed, None if str(target) == str(folder) else folder)
