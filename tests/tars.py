"""Tars for the tests, sound and damaged."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar of samples: key and members by suffix."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                add(tar, f"{key}.{suffix}", data)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def offsets(path: Path) -> list[tuple[int, int, int]]:
    """(header, data, size) of every member."""
    with tarfile.open(path) as tar:
        return [(member.offset, member.offset_data, member.size) for member in tar]
