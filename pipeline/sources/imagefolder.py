"""Images in folders: a folder for each class, or no classes at all."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.shards import IMAGE_SUFFIXES, BadShards
from zfnet import images


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Every image file beneath a folder.

    The class is the first folder of an image's path, if every image lies in one; images directly in the folder have no
    class, and then none has. Which split an image belongs to follows from a hash of its path alone, so adding images
    never moves one from training to validation.
    """

    folder: Path
    validation_share: float = 0.2

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise BadShards(f"there is no folder {self.folder}: give the folder that holds the images")
        if not 0 <= self.validation_share <= 1:
            raise BadShards(f"the validation share is {self.validation_share}: give a share from 0 to 1")

    @cached_property
    def _paths(self) -> list[Path]:
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        paths = sorted(path for path in found if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
        if not paths:
            raise BadShards(f"no images in {self.folder}: expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        return paths

    @cached_property
    def classes(self) -> list[str] | None:
        """Names of the folders, in order; None where an image lies in none."""
        if any(len(path.parts) == 1 for path in self._paths):
            return None
        names = sorted({path.parts[0] for path in self._paths})
        if len({_text(name) for name in names}) != len(names):
            raise BadShards(f"two class folders in {self.folder} have the same name once it is UTF-8: rename one")
        return [_text(name) for name in names]

    @cached_property
    def _split_paths(self) -> dict[str, list[Path]]:
        split: dict[str, list[Path]] = {"train": [], "val": []}
        for path in self._paths:
            digest = hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()
            share = int.from_bytes(digest[:8], "big") / 2**64
            split["val" if share < self.validation_share else "train"].append(path)
        return split

    @cached_property
    def _keys(self) -> dict[Path, str]:
        """The path without its suffix, which is kept where another file differs in nothing else; dots become '_'."""
        plain = {path: _dotless(path.with_suffix("")) for path in self._paths}
        count = Counter(plain.values())
        keys = {path: key if count[key] == 1 else _dotless(path) for path, key in plain.items()}
        twice = [key for key, number in Counter(keys.values()).items() if number > 1]
        if twice:
            paths = [str(path) for path, key in keys.items() if key == twice[0]]
            raise BadShards(f"{', '.join(map(_text, paths))} give the same key {twice[0]!r}: rename all but one")
        return keys

    @property
    def splits(self) -> dict[str, int]:
        """Images of each split."""
        return {name: len(paths) for name, paths in self._split_paths.items()}

    def about(self) -> dict[str, Any]:
        """What decides the content: the paths and sizes of all files."""
        listing = [[path.as_posix(), (self.folder / path).stat().st_size] for path in self._paths]
        digest = hashlib.sha256(repr(listing).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return {"kind": "imagefolder", "files": digest, "validation_share": self.validation_share}

    def sample(self, split: str, number: int) -> dict[str, Any]:
        """The file's bytes, untouched, under its path as key."""
        path = self._split_paths[split][number]
        data = (self.folder / path).read_bytes()
        source = _text(path.as_posix())
        sample: dict[str, Any] = {
            "__key__": self._keys[path],
            path.suffix.lower().lstrip("."): data,
            "json": {"source": source, **images.describe(data)},
        }
        if self.classes is not None:
            label = self.classes.index(_text(path.parts[0]))
            sample["cls"] = label
            sample["json"] |= {"cls": label, "label": self.classes[label]}
        return sample


def _dotless(path: Path) -> str:
    """webdataset ends a key at the first dot of a name."""
    return _text(path.as_posix()).replace(".", "_")


def _text(name: str) -> str:
    """A name as UTF-8; bytes that are not become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
