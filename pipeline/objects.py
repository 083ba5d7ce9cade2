"""The objects that a sample's json names: `boxes`, a list of {"label": name, "xyxy": [left, top, right, bottom]}.

Published boxes have faults: some have no area, some no class of the index. Such a box is left out, with the reason; the
image is used without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.shards import Sample
from zfnet.merging import Edges


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of one image, in the order of its json."""

    boxes: Edges
    """[N, 4] top, left, bottom, right in pixels of the image as stored."""
    labels: npt.NDArray[np.int64]
    """[N] classes, by their place in the index."""
    refused: list[tuple[Any, str]]
    """Entries that are no usable box, each with a reason: no_area, unknown_class, no_box."""

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, label: int) -> Edges:
        """The boxes of one class."""
        found: Edges = self.boxes[self.labels == label]
        return found


def objects_of(sample: Sample, classes: Sequence[str]) -> Objects:
    """The objects of a sample; none where it has no json, or one without boxes."""
    boxes, labels, refused = [], [], []
    for entry in _entries(sample.members.get("json", b"")):
        try:
            left, top, right, bottom = (float(edge) for edge in entry["xyxy"])
            label = entry["label"]
        except (KeyError, TypeError, ValueError):
            refused.append((entry, "no_box"))
            continue
        if not np.isfinite([left, top, right, bottom]).all() or right <= left or bottom <= top:
            refused.append((entry, "no_area"))
        elif label not in classes:
            refused.append((entry, "unknown_class"))
        else:
            boxes.append([top, left, bottom, right])
            labels.append(list(classes).index(label))
    return Objects(np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64), refused)


def _entries(text: bytes) -> list[Any]:
    try:
        found = json.loads(text)["boxes"]
        return list(found) if isinstance(found, list) else []
    except (ValueError, KeyError, TypeError):
        return []
