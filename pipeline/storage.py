"""Files on any storage that pyarrow reaches: a laptop's disk, `s3://`, `gs://`. One code path for all.

A file appears under its name whole or not at all: it is built under a temporary name and then renamed (local), or
built whole and then sent by one PUT (object stores). Nothing else in the project opens a file for writing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

READ_ATTEMPTS = 3
T = TypeVar("T")
_TEMPORARY = ".tmp-"


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

        Raises: StorageError for an unknown scheme, or a relative path in a packaged Ray working directory.
        """
        if isinstance(path, Location):
            return path
        text = os.fspath(path)
        if "://" in text:
            address, _, query = text.partition("?")
            uri = address.rstrip("/") + (f"?{query}" if query else "")
            try:
                filesystem, inner = pafs.FileSystem.from_uri(uri)
                return cls(filesystem, inner, query)
            except (pa.ArrowInvalid, OSError, ValueError) as error:
                raise StorageError(f"cannot use {text!r}: {error}; give a local path, s3:// or gs://") from None
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
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        found = (info.base_name for info in self.filesystem.get_file_info(selector))
        return sorted(name for name in found if not name.startswith(_TEMPORARY))

    def read(self) -> bytes:
        """The whole file. Raises: FileNotFoundError, StorageError after several attempts."""
        return retrying(self, self._read_once)

    def _read_once(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            data: bytes = stream.read()
            return data

    def open(self) -> Any:
        """The file for random access, as a pyarrow NativeFile. Raises: FileNotFoundError."""
        return self.filesystem.open_input_file(self.path)

    def write(self, data: bytes, staging: Location | None = None) -> None:
        """Write the file whole, or not at all, built where `whole_file` says. Raises: StorageError."""
        with self.whole_file(staging) as file:
            file.write(data)

    @contextmanager
    def whole_file(self, staging: Location | None = None) -> Iterator[BinaryIO]:
        """A binary file that appears under this name when the block ends without an exception.

        Args:
            staging: a folder on the same storage for the temporary name, default beside the file. What a killed
                writer leaves there goes with the folder.
        """
        temporary = self._temporary(staging)
        try:
            with cannot_write(self), temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            with cannot_write(self):
                self._commit(temporary, staging or self.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self, staging: Location | None) -> Path:
        name = f"{_TEMPORARY}{uuid.uuid4().hex}"
        folder = (staging or self.parent).local
        try:
            if folder is None:
                return Path(tempfile.gettempdir()) / name
            folder.mkdir(parents=True, exist_ok=True)
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            return folder / name
        except OSError as error:
            raise StorageError(
                f"cannot write in {folder}: {error.strerror}; choose a folder that can be written"
            ) from error

    def _commit(self, temporary: Path, staging: Location) -> None:
        if self.local is not None:
            temporary.replace(self.path)
            return
        # A stream that breaks off is closed like one that ended well, so the upload has a temporary name too.
        upload = staging / temporary.name
        try:
            with temporary.open("rb") as source, self.filesystem.open_output_stream(upload.path) as target:
                shutil.copyfileobj(source, target, length=2**24)
            self.filesystem.move(upload.path, self.path)
        finally:
            upload.delete()

    def delete(self) -> None:
        """Delete the file or folder; no error where there is none."""
        info = self._info()
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
def cannot_write(location: Location) -> Iterator[None]:
    """Errors of storage inside the block are reported with the file's name and what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {location}: {error.strerror or error}; free space or choose another place, "
            "then give the same command again"
        ) from error


def retrying(location: Location, action: Callable[[], T]) -> T:
    """The action's result; errors of storage are tried again from the start, then reported with the file's name."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"there is no file {location}") from None
        except OSError as error:
            if attempt == READ_ATTEMPTS:
                raise StorageError(f"cannot read {location} after {attempt} attempts: {error}") from error
            time.sleep(0.2 * 4**attempt)
    raise AssertionError("unreachable")


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
