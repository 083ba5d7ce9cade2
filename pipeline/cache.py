"""Shards of an object store on the node's own disk, so that each is fetched once and not once for every image.

$ZFNET_CACHE is a folder on a disk of the node, $ZFNET_CACHE_GB how much of it may be filled. All processes of the node
share it. A copy is named by the sha256 that the index holds of the shard: it is the bytes that data_id names, whole, or
it is not there. What changed on storage since it was indexed is never copied. The copies that were used longest ago go
first; where all were used just now the cache is too small for the job, and further shards are read from storage as if
there were none, rather than fetched again and again.

CACHE/SHA256.tar    a shard
CACHE/SHA256.part   one that is being fetched, locked by who fetches it
CACHE/lock          held while room is made
"""

from __future__ import annotations

import fcntl
import functools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pipeline.storage import Location, StorageError

GIGABYTES = 100.0
"""Of a cache whose $ZFNET_CACHE_GB is not given."""
RECENT_SECONDS = 60.0
"""A copy that was used within them stays, and what could not be kept is not tried again before they are over."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of copies, at most `limit` bytes."""

    folder: Path
    limit: int
    refused: dict[str, float] = field(default_factory=dict)
    """What could not be kept: there was no room, or it is not what the index says. Until when it is not tried again."""

    def open(self, shard: Location, size: int, sha256: str) -> BinaryIO | None:
        """The copy of a shard, fetched where it is not there yet; None where it cannot be kept.

        Args:
            shard: where it lies.
            size, sha256: of the shard, as the index has them.

        Raises: FileNotFoundError, StorageError where the shard cannot be read, or the cache's folder not be written.
        """
        while time.monotonic() >= self.refused.get(sha256, 0):
            found = self._copy(sha256, size)
            if found is not None:
                return found
            with self._part(sha256) as part:
                if part is not None and not self._fetch(shard, size, sha256, part):
                    self.refused[sha256] = time.monotonic() + RECENT_SECONDS
                    return None
        return None

    def _copy(self, sha256: str, size: int) -> BinaryIO | None:
        """The copy, which from now on counts as used last."""
        path = self.folder / f"{sha256}.tar"
        try:
            file = path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return None
        if os.fstat(file.fileno()).st_size == size:
            os.utime(file.fileno())
            return file
        file.close()
        path.unlink(missing_ok=True)  # somebody cut it
        return None

    @contextmanager
    def _part(self, sha256: str) -> Iterator[BinaryIO | None]:
        """The locked file to fetch the shard to, gone after the block; None where another process has just done so."""
        path = self.folder / f"{sha256}.part"
        with _writable(self.folder), os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a killed holder's lock is gone with it
            if not _is_at(file, path):
                yield None
                return
            try:
                yield None if path.with_suffix(".tar").exists() else file
            finally:
                if _is_at(file, path):
                    path.unlink()

    def _fetch(self, shard: Location, size: int, sha256: str, part: BinaryIO) -> bool:
        """Fetch the shard and give it its name; whether it could be kept."""
        if shard.size() != size or not self._has_room(size, part):
            return False
        path = self.folder / f"{sha256}.part"
        found = shard.download(part, str(path))
        part.truncate()
        part.flush()
        if found == sha256:
            path.rename(path.with_suffix(".tar"))
        return found == sha256

    def _has_room(self, size: int, part: BinaryIO) -> bool:
        """Reserve `size` bytes on the disk, deleting what was used longest ago; whether they are there."""
        part.truncate(0)
        with (self.folder / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = sorted(self._files(), key=lambda entry: entry[1].st_mtime)
            used = sum(status.st_size for _, status in files)
            for path, status in files:
                if used + size <= self.limit or status.st_mtime > time.time() - RECENT_SECONDS:
                    break
                used -= status.st_size if _deleted(path) else 0
            try:
                if used + size <= self.limit:
                    os.posix_fallocate(part.fileno(), 0, size)
                return used + size <= self.limit
            except OSError:  # the disk is full of other things
                return False

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("*.*"):
            try:
                yield path, path.stat()
            except FileNotFoundError:
                continue


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _deleted(path: Path) -> bool:
    """Delete a copy, or what a killed process left of one; not what is being fetched. Who reads it can go on."""
    if path.suffix == ".part":
        try:
            with path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except OSError:
            return False
        return True
    path.unlink(missing_ok=True)
    return True


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (StorageError, FileNotFoundError):
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror}; give a folder of this node's disk as ZFNET_CACHE, or none"
        ) from error


def of_this_node() -> ShardCache | None:
    """The cache that the environment names, or None. Raises: StorageError."""
    folder = os.environ.get("ZFNET_CACHE")
    return _cache(folder, os.environ.get("ZFNET_CACHE_GB", "")) if folder else None


@functools.cache
def _cache(folder: str, gigabytes: str) -> ShardCache:
    try:
        limit = float(gigabytes or GIGABYTES)
        if limit <= 0 or not Path(folder).expanduser().is_absolute():
            raise ValueError
    except ValueError:
        raise StorageError(
            f"ZFNET_CACHE is {folder!r} and ZFNET_CACHE_GB {gigabytes!r}: give an absolute path on a disk of the node, "
            "and a number of gigabytes above 0"
        ) from None
    return ShardCache(Path(folder).expanduser(), int(limit * 1e9))
