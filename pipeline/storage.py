"""Files on any storage that pyarrow reaches: a laptop's disk, `s3://`, `gs://`. One code path for all.

A file appears under its name whole or not at all: it is built whole, and then renamed (local) or sent (object stores),
there by one PUT up to 10 MB, else in parts that are nothing until the last request joins them. Nothing else in the
project opens a file for writing. Where the storage is and who may use it is said by the usual environment variables:
docs/storage.md.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline import patience

READ_ATTEMPTS = 3
CHUNK_BYTES = 16 * 2**20
"""Of a file are read or sent at a time."""
SILENT_SECONDS = 20.0
"""Without a byte from an object store before its client asks again."""
_IN_FLIGHT_BYTES = 64 * 2**20
_CLIENT_ATTEMPTS = 6
T = TypeVar("T")
_TEMPORARY = ".tmp-"
_VARIABLES = ("AWS_", "GOOGLE_", "GS_", "CLOUD_STORAGE_")
"""Beginnings of the names of those that say where object stores are."""


class StorageError(OSError):
    """Storage refused; the message says which file and what to do. Never the fault of an image."""


@dataclass(frozen=True)
class Location:
    """A file or folder: a pyarrow filesystem and a path in it."""

    filesystem: pafs.FileSystem
    path: str
    query: str = ""
    """Of the URL that it came from: endpoint, region and the like, so that its text means the same elsewhere."""

    @classmethod
    def of(cls, path: str | os.PathLike[str] | Location) -> Location:
        """A location from a path or URL. Relative paths are taken from $ZFNET_HOME where it is set.

        Raises: StorageError for an empty path, a URL without a bucket or of an unknown scheme, or a relative path in a
            packaged Ray working directory.
        """
        if isinstance(path, Location):
            return path
        text = os.fspath(path)
        if not text.strip():
            raise StorageError(
                f"the path {text!r} is empty: give a local path, s3:// or gs://; . is the current folder"
            )
        if "://" in text:
            address, _, query = text.partition("?")
            return cls(*_connect(address, query), query)
        home = os.environ.get("ZFNET_HOME", "")
        if "://" in home and not Path(text).expanduser().is_absolute():
            return cls.of(home) / text
        return cls(pafs.LocalFileSystem(), _absolute(text))

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, str(PurePosixPath(self.path) / name), self.query)

    def __str__(self) -> str:
        scheme = {"gcs": "gs"}.get(self.filesystem.type_name, self.filesystem.type_name)
        query = f"?{self.query}" if self.query else ""
        return self.path if self.local else f"{scheme}://{self.path}{query}"

    @property
    def local(self) -> Path | None:
        """The local path, or None on an object store."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def parent(self) -> Location:
        """The folder that holds it."""
        return Location(self.filesystem, str(PurePosixPath(self.path).parent), self.query)

    def times(self) -> dict[str, float]:
        """What lies in this folder -> when it was written, in seconds since 1970; 0 for a folder of a bucket."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = retrying(self, lambda: self.filesystem.get_file_info(selector))
        written = {info.base_name: (info.mtime_ns or 0) / 1e9 for info in found}
        return {name: when for name, when in written.items() if not name.startswith(_TEMPORARY)}

    def exists(self) -> bool:
        """Whether a file or folder of this name is there."""
        return bool(self._info().type != pafs.FileType.NotFound)

    def size(self) -> int:
        """Bytes of the file. Raises: FileNotFoundError."""
        info = self._info()
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"there is no file {self}")
        return int(info.size)

    def names(self) -> list[str]:
        """Sorted names of what lies in this folder; none where it does not exist. Temporary names are left out."""
        # Of a folder that is only a part of objects' names, Google's listing knows nothing but the objects.
        deep = self.filesystem.type_name == "gcs"
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=deep)
        infos = retrying(self, lambda: self.filesystem.get_file_info(selector))
        found = {PurePosixPath(info.path).relative_to(self.path).parts[0] for info in infos}
        return sorted(name for name in found if not name.startswith(_TEMPORARY))

    def read(self) -> bytes:
        """The whole file. Raises: FileNotFoundError, StorageError after several attempts."""
        return retrying(self, lambda: b"".join(self._chunks()))

    def read_json(self) -> Any:
        """What the whole file says as JSON. Raises: FileNotFoundError, StorageError where it is damaged."""
        try:
            return json.loads(self.read())
        except ValueError as error:
            raise StorageError(
                f"{self} is damaged ({error}): bring it back, or delete it and give the command that wrote it again"
            ) from None

    def read_range(self, start: int, length: int) -> bytes:
        """Bytes of the file, fewer where it ends early. Raises: FileNotFoundError, StorageError."""

        def action() -> bytes:
            with self._open() as file:
                expected = max(0, min(length, file.size() - start))
                data: bytes = file.read_at(expected, start) if expected else b""
                if len(data) < expected:
                    raise OSError(f"read {len(data)} of {expected} bytes at {start}")
                return data

        return retrying(self, action)

    def download(self, target: BinaryIO, name: str) -> str:
        """Write the whole file to the start of a local one, which messages call `name`; returns its sha256 in hex.

        Raises: FileNotFoundError, StorageError after several attempts.
        """

        def action() -> str:
            target.seek(0)
            digest = hashlib.sha256()
            for chunk in self._chunks():
                digest.update(chunk)
                with cannot_write(Location.of(name)):
                    target.write(chunk)
            return digest.hexdigest()

        return retrying(self, action)

    def _chunks(self) -> Iterator[bytes]:
        """The file from its start, in few requests: pyarrow's streams make one for every 256 kB."""
        with self._open() as file:
            place, size = 0, file.size()
            while place < size:
                data: bytes = file.read_at(min(CHUNK_BYTES, size - place), place)
                if not data:
                    raise OSError(f"read {place} of {size} bytes")
                patience.progress()
                place += len(data)
                yield data

    def _open(self) -> Any:
        return self.filesystem.open_input_file(self.path)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The file for random access, as a pyarrow NativeFile. Raises: FileNotFoundError, StorageError."""
        with retrying(self, self._open) as file:
            try:
                yield file
            except FileNotFoundError:
                raise
            except OSError as error:
                raise _cannot(self, "read", error) from error

    def write(self, data: bytes, staging: Location | None = None) -> None:
        """Write the file whole, or not at all, built where `whole_file` says. Raises: StorageError."""
        if self.local is None:
            self._upload(io.BytesIO(data))
            return
        with self.whole_file(staging) as file:
            file.write(data)

    def write_new(self, data: bytes, staging: Location) -> bool | None:
        """Write a file on a disk unless there is one; of several who do so at once, one does.

        Returns: whether it was written; None where storage has no such step, and nothing was. Raises: StorageError.
        """
        if self.local is None:
            return None
        built = staging / f"new-{uuid.uuid4().hex}"
        built.write(data)
        try:
            os.link(built.path, self.path)
        except FileExistsError:
            return False
        except OSError:  # a disk without hard links
            return None
        finally:
            built.delete()
        return True

    @contextmanager
    def whole_file(self, staging: Location | None = None) -> Iterator[BinaryIO]:
        """A binary file that appears under this name when the block ends without an exception.

        On an object store it is built in a nameless file in the folder for temporary files ($TMPDIR).

        Args:
            staging: a local folder on the same disk for the temporary name, default beside the file. What a killed
                writer leaves there goes with the folder.
        """
        if self.local is None:
            with cannot_write(self, built_in=tempfile.gettempdir()), tempfile.TemporaryFile() as built:
                yield built
                built.flush()
                self._upload(built)
            return
        temporary = self._temporary((staging or self.parent).local or self.local.parent)
        try:
            with cannot_write(self), temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with cannot_write(self):
                temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self, folder: Path) -> Path:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot write in {folder}: {error.strerror}; choose a folder that can be written"
            ) from error
        return folder / f"{_TEMPORARY}{uuid.uuid4().hex}"

    def _upload(self, source: BinaryIO) -> None:
        """Send a file that is whole. Raises: StorageError; then there is what was there before."""

        def action() -> None:
            source.seek(0)
            # Errors of a stream that writes in the background stay with it, so closing it cannot complete an upload of
            # which a part is missing; one that writes at once forgets them, and does.
            stream = self.filesystem.open_output_stream(self.path)
            try:
                sent = 0
                while chunk := source.read(CHUNK_BYTES):
                    stream.write(chunk)
                    sent += len(chunk)
                    if sent % _IN_FLIGHT_BYTES == 0:
                        stream.flush()  # waits: memory holds no more than this
                    patience.progress()
                stream.close()
            except BaseException:
                _never_closed(stream)
                raise

        retrying(self, action, "write")

    def delete(self) -> None:
        """Delete the file or folder; no error where there is none. Raises: StorageError."""
        info = self._info()
        # Google's client deletes what lies in such a folder, and then misses the folder.
        with cannot_write(self), suppress(FileNotFoundError):
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif info.type == pafs.FileType.File:
                self.filesystem.delete_file(self.path)

    def _info(self) -> Any:
        return retrying(self, lambda: self.filesystem.get_file_info(self.path))

    def clear_temporary(self, prefix: str = "") -> None:
        """Delete what killed writers left in this local folder."""
        for path in self.local.glob(f"{_TEMPORARY}{prefix}*") if self.local is not None else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def cannot_write(location: Location, built_in: str | None = None) -> Iterator[None]:
    """Errors of storage inside the block are reported with the file's name and what to do.

    Args:
        built_in: a local folder where the file is built first.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise _cannot(location, "write", error, f" (built in {built_in} first; $TMPDIR)" if built_in else "") from error


def _cannot(location: Location, verb: str, error: Exception, where: str = "") -> StorageError:
    todo = "free space or choose another place, then give the same command again" if verb == "write" else ""
    return StorageError(f"cannot {verb} {location}{where}: {'; '.join(filter(None, [_reason(error), todo]))}")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).strip().removesuffix(":")


def retrying(location: Location, action: Callable[[], T], verb: str = "read") -> T:
    """The action's result; errors of storage are tried again from the start, then reported with the file's name.

    Raises: FileNotFoundError, and StorageError, also where storage does not answer at all (see pipeline.patience).
    """
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return patience.answered(action)
        except patience.Hung as error:
            raise StorageError(
                f"cannot {verb} {location}: storage has not answered for {error.seconds:g} s ($ZFNET_STORAGE_TIMEOUT); "
                "give the same command again when it does"
            ) from None
        except StorageError:
            raise
        except (OSError, pa.ArrowInvalid) as error:  # the latter is what Google's client makes of a status of 400
            if verb == "read" and isinstance(error, FileNotFoundError | NotADirectoryError):
                raise FileNotFoundError(f"there is no file {location}") from None
            if attempt == READ_ATTEMPTS:
                raise _cannot(location, verb, error, f" after {attempt} attempts") from error
            time.sleep(0.2 * 4**attempt)
    raise AssertionError("unreachable")


def _never_closed(stream: Any) -> None:
    """Keep a stream from its destructor, which closes it: that would complete an upload of which a part is missing.

    Not in a list: at the end of the process that would be destroyed too, after pyarrow's threads, and wait for them for
    ever.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))


def _connect(address: str, query: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URL, and the path in it. Raises: StorageError."""
    shown = address + (f"?{query}" if query else "")
    if "@" in address:
        raise StorageError(
            f"there are credentials in a URL of {address.rpartition('@')[2]}: they would be printed and stored. Set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or GOOGLE_APPLICATION_CREDENTIALS), or for anonymous access "
            "AWS_NO_SIGN_REQUEST=YES (GS_NO_SIGN_REQUEST=YES)"
        )
    try:
        scheme, _, path = address.partition("://")
        if scheme not in ("s3", "gs", "gcs"):
            filesystem, path = pafs.FileSystem.from_uri(shown)
            return filesystem, path
        path = path.rstrip("/")
        if not path or path.startswith("/"):
            raise ValueError(f"it names no bucket, as {scheme}://bucket/folder does")
        told = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        return _client(f"{scheme}://{path.partition('/')[0]}", query, tuple(told.items())), str(PurePosixPath(path))
    except (pa.ArrowInvalid, OSError, ValueError) as error:
        raise StorageError(f"cannot use {shown!r}: {_first_line(error)}; give a local path, s3:// or gs://") from None


@functools.cache
def _client(bucket: str, query: str, environment: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    """The filesystem of a bucket. One is kept: to make one, pyarrow waits for every request of the process to end."""
    filesystem, _ = pafs.FileSystem.from_uri(bucket + (f"?{query}" if query else ""))
    return _adjusted(filesystem)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def _adjusted(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same, with what neither the URL nor pyarrow's defaults can say."""
    rebuild, (options,) = filesystem.__reduce__()
    if isinstance(filesystem, pafs.GcsFileSystem):
        limit = timedelta(seconds=patience.SECONDS)
        return rebuild({**options, "anonymous": _is_set("GS_NO_SIGN_REQUEST"), "retry_time_limit": limit})
    return rebuild(
        {
            **options,
            "anonymous": _is_set("AWS_NO_SIGN_REQUEST"),
            "allow_delayed_open": True,  # one PUT instead of three requests for what is smaller than a part
            "request_timeout": SILENT_SECONDS,  # pyarrow says that Linux ignores it; measured, it does not
            "connect_timeout": SILENT_SECONDS,
            "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=_CLIENT_ATTEMPTS),
        }
    )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("yes", "true", "1")


def _absolute(text: str) -> str:
    path = Path(text).expanduser()
    if path.is_absolute():
        return str(path)
    home = os.environ.get("ZFNET_HOME")
    if home:
        return str(Path(home) / path)
    if "_ray_pkg_" in str(Path.cwd()):
        raise StorageError(
            f"{text!r} is relative, and this job runs in a throw-away copy of your folder: what is written there is "
            "lost. Give an absolute path that every node sees, or an s3:// or gs:// one, or set ZFNET_HOME to one"
        )
    return str(Path.cwd() / path)
