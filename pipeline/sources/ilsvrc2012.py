"""ImageNet 2012 as it is handed out: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the development kit."""

from __future__ import annotations

import io
import re
import tarfile
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

        with tarfile.open(self.folder / DEVKIT) as kit:
            member = next((m for m in kit if m.name.endswith("data/meta.mat")), None)
            stream = kit.extractfile(member) if member else None
            if stream is None:
                raise BadShards(f"{DEVKIT} holds no data/meta.mat: download it again")
            meta = loadmat(io.BytesIO(stream.read()), squeeze_me=True)["synsets"]
        leaves = [row for row in meta if int(row["num_children"]) == 0]
        return {int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"])) for row in leaves}

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
        with tarfile.open(self.folder / DEVKIT) as kit:
            member = next((m for m in kit if m.name.endswith(_TRUTH)), None)
            stream = kit.extractfile(member) if member else None
            if stream is None:
                raise BadShards(f"{DEVKIT} holds no {_TRUTH}: download it again")
            truth = [int(line) for line in stream.read().split()]
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


def _members(path: Path, start: int) -> list[_Place]:
    """Files of the tar that starts at byte `start` of a file."""
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            return [_Place(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
