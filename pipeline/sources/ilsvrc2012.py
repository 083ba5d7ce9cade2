"""ImageNet 2012 as it is handed out: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the development kit."""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.shards import BadShards
from zfnet import images

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class _Place:
    """Bytes of an image inside a tar on disk."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Ilsvrc2012:
    """The official archives, read in place: nothing is unpacked. Classes are wnids in sorted order, as everywhere."""

    folder: Path

    def __post_init__(self) -> None:
        missing = [name for name in (TRAIN, VAL, DEVKIT) if not (self.folder / name).is_file()]
        if missing:
            raise BadShards(f"{self.folder} lacks {', '.join(missing)}: give the folder with the official archives")

    @cached_property
    def _synsets(self) -> dict[int, tuple[str, str]]:
        """ILSVRC2012_ID -> wnid and words, from the kit's meta.mat."""
        from scipy.io import loadmat

        meta = loadmat(io.BytesIO(self._from_kit("data/meta.mat")), squeeze_me=True)["synsets"]
        leaves = [row for row in meta if int(row["num_children"]) == 0]
        return {int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"])) for row in leaves}

    def _from_kit(self, name: str) -> bytes:
        """A file of the development kit."""
        with _archive(self.folder / DEVKIT), tarfile.open(self.folder / DEVKIT) as kit:
            member = next((m for m in kit if m.name.endswith(name)), None)
            stream = kit.extractfile(member) if member else None
            if stream is None:
                raise BadShards(f"{DEVKIT} holds no {name}: download it again")
            return stream.read()

    @cached_property
    def _wnids(self) -> list[str]:
        return sorted(wnid for wnid, _ in self._synsets.values())

    @cached_property
    def classes(self) -> list[str] | None:
        """The words of each class, in the order of wnids."""
        words = dict(self._synsets.values())
        return [words[wnid] for wnid in self._wnids]

    @cached_property
    def _train(self) -> list[tuple[_Place, str]]:
        """Images of the tars inside the training tar, with their wnids."""
        places = []
        for inner in _members(self.folder / TRAIN, 0):
            wnid = inner.name.removesuffix(".tar")
            places += [(place, wnid) for place in _members(self.folder / TRAIN, inner.offset)]
        return sorted(places, key=lambda entry: entry[0].name)

    @cached_property
    def _val(self) -> list[tuple[_Place, str]]:
        truth = [int(line) for line in self._from_kit(_TRUTH).split()]
        places = sorted(_members(self.folder / VAL, 0), key=lambda place: place.name)
        numbers = [int(re.findall(r"\d+", place.name)[-1]) for place in places]
        if numbers and max(numbers) > len(truth):
            raise BadShards(f"{VAL} holds image {max(numbers)}; the kit knows {len(truth)}: do they belong together?")
        return [(place, self._synsets[truth[n - 1]][0]) for place, n in zip(places, numbers, strict=True)]

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return {"train": len(self._train), "val": len(self._val)}

    def about(self) -> dict[str, Any]:
        """What decides the content."""
        return {"kind": "ilsvrc2012", "splits": self.splits, "classes": len(self._wnids)}

    def sample(self, split: str, number: int) -> dict[str, Any]:
        """The JPEG's bytes, untouched."""
        place, wnid = (self._train if split == "train" else self._val)[number]
        with (self.folder / (TRAIN if split == "train" else VAL)).open("rb") as archive:
            archive.seek(place.offset)
            data = archive.read(place.size)
        label = self._wnids.index(wnid)
        about = {"cls": label, "wnid": wnid, "label": (self.classes or [])[label], **images.describe(data)}
        return {"__key__": Path(place.name).stem, "jpg": data, "cls": label, "json": about}


@contextmanager
def _archive(path: Path) -> Iterator[None]:
    """Damage of an archive is reported by its name."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise BadShards(f"{path.name} is damaged ({error or 'it ends early'}): download it again") from None


def _members(path: Path, start: int) -> list[_Place]:
    """Files of the tar that starts at byte `start` of a file. Raises: BadShards unless it is whole."""
    with _archive(path), path.open("rb") as file:
        size = path.stat().st_size
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            places = [_Place(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
            file.seek(tar.offset)
            ended = file.read(2 * tarfile.BLOCKSIZE) == bytes(2 * tarfile.BLOCKSIZE)
        if not ended or any(place.offset + place.size > size for place in places):
            raise BadShards(f"{path.name} is damaged (it has no end-of-archive mark): download it again")
        return places
