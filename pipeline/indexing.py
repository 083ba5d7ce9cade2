"""The index of a folder of shards: every tar is walked once, and what is damaged is found before anything reads it.

Damage of any kind: the tar must end with its end-of-archive mark, which no tar reader asks for.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import tables
from pipeline.shards import BLOCK, SAMPLES, BadShards, Index, split_name
from pipeline.storage import Location, StorageError

_LONGEST_HEADER = 2**20  # bytes that a long name or a pax header goes on for
_MOST_UNNAMED_CLASSES = 100_000
_NAMED = 5
"""Shards that a message names."""


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
            size, sha256 = _identity(file)
            file.seek(0)
            damage = _walk(file, size, rows)
    except FileNotFoundError:
        raise BadShards(f"there is no shard {location}") from None
    except OSError as error:
        raise StorageError(f"cannot read {location}: {error}") from error
    for row in rows:
        row.update(split=split_of(location.name), shard=location.name)
    return Scan(location.name, size, sha256, rows, damage)


def check(index: Index) -> None:
    """Read every shard that the index lists, and compare it with what it was, byte for byte by its sha256.

    Raises: BadShards naming the shards that are gone or were changed, StorageError.
    """
    changed = []
    for file, expected in index.identities.items():
        try:
            with _at_hand(index.folder / file) as opened:
                found = _identity(opened)
            if found != expected:
                changed.append(f"{file} was changed ({expected[0]} bytes then, {found[0]} now)")
        except FileNotFoundError:
            changed.append(f"{file} is gone")
        except OSError as error:
            raise StorageError(f"cannot read {index.folder / file}: {error}") from error
    if changed:
        raise BadShards(
            f"{len(changed)} of {len(index.identities)} shards in {index.folder} are not what the index lists: "
            f"{'; '.join(changed[:_NAMED])}{'; ...' if len(changed) > _NAMED else ''}. Bring them back, or make the "
            "index again: tables of the old ones are then tables of other images"
        )


def _identity(file: Any) -> tuple[int, str]:
    """Bytes and sha256 of a file from here on to its end, where it stands then."""
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return file.tell(), sha256


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
            raise tarfile.ReadError(f"the header at byte {self.tell() - BLOCK} claims to go on for {size} bytes")
        read: bytes = self._read(size)
        return read


def _walk(file: Any, size: int, rows: list[dict[str, Any]]) -> str | None:
    """Append a row for each sample of the tar; returns what is wrong with the file, or None."""
    if size == 0:
        return "the file is empty"
    try:
        with tarfile.open(fileobj=cast(Any, _Bounded(file)), mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK if member.isreg() else member.offset_data
                if end > size:
                    return f"it ends inside {member.name!r}, at byte {size} of at least {end}"
                name = split_name(member.name)
                if member.isreg() and name is not None:
                    _add_member(file, member, name, end, rows)
            file.seek(tar.offset)
            if file.read(2 * BLOCK) != bytes(2 * BLOCK):
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
    if suffix == "cls" and member.size <= BLOCK:
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
