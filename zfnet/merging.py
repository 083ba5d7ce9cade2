"""Greedy merging of boxes that were predicted from many windows (OverFeat section 4.3, steps d to g).

Again and again the two boxes that match best are replaced by their average, until no two match well enough. The paper's
match score is "the sum of the distance between centers of the two bounding boxes and the intersection area of the
boxes"; the pair of the lowest score is merged, and merging stops above a threshold t. Taken literally a large
intersection would then keep boxes apart, and disjoint ones would merge. Here the second term falls with the overlap,
and both have no unit: the distance of the centres, in diagonals, and 1 - intersection over union.

Boxes are edges (top, left, bottom, right), the paper's order (Fig. 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Edges = npt.NDArray[np.float64]
Average = Literal["confidence", "paper"]


def area(boxes: Edges) -> Edges:
    """[...] of boxes [..., 4]; 0 where an edge lies before its opposite."""
    found: Edges = np.maximum(boxes[..., 2] - boxes[..., 0], 0) * np.maximum(boxes[..., 3] - boxes[..., 1], 0)
    return found


def intersection(one: Edges, other: Edges) -> Edges:
    """Area that two boxes share; [..., 4] and [..., 4] broadcast."""
    return area(np.concatenate([np.maximum(one, other)[..., :2], np.minimum(one, other)[..., 2:]], -1))


def iou(one: Edges, other: Edges) -> Edges:
    """Intersection over union; [..., 4] and [..., 4] broadcast. 0 where neither has an area."""
    shared = intersection(one, other)
    union = area(one) + area(other) - shared
    found: Edges = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return found


def match_score(one: Edges, other: Edges) -> Edges:
    """How badly two boxes with an area match: 0 for equal ones, above 1 for disjoint ones; [..., 4] broadcast.

    The distance of their centres as a share of the mean of their diagonals, plus 1 - IoU.
    """
    down, across = (((one[..., i] + one[..., i + 2]) - (other[..., i] + other[..., i + 2])) / 2 for i in (0, 1))
    diagonal = (_diagonal(one) + _diagonal(other)) / 2
    found: Edges = np.sqrt(down * down + across * across) / diagonal + (1 - iou(one, other))
    return found


def _diagonal(boxes: Edges) -> Edges:
    height, width = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    found: Edges = np.sqrt(height * height + width * width)
    return found


@dataclass(frozen=True, eq=False)
class Merged:
    """What is left of N boxes."""

    boxes: Edges
    """[M, 4]"""
    scores: Edges
    """[M], sums over the windows that each was merged from."""
    windows: npt.NDArray[np.int64]
    """[M], how many windows each was merged from: they add up to N."""


def greedy_merge(boxes: Edges, scores: Edges, threshold: float, average: Average = "confidence") -> Merged:
    """Merge until the best match scores above `threshold`.

    Of equally good pairs the one that stands first is merged, and what comes of it stands last.

    Args:
        boxes: [N, 4], each with an area.
        scores: [N], above 0: the confidence of each window.
        threshold: of `match_score`; at 0 only equal boxes are merged.
        average: of two boxes that are merged. "paper" is the mean of their coordinates, in which the last of ten
            windows weighs as much as the nine before it; under "confidence" each window weighs as its score.

    Returns: boxes in the order in which they stand. The work grows with N squared.
    Raises: ValueError for a box without an area, or a score that is not above 0.
    """
    boxes, scores = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(scores, np.float64)
    if not (area(boxes) > 0).all() or not (scores > 0).all():
        raise ValueError("boxes are merged that have an area and a score above 0: leave the others out")
    left, count = _Standing(boxes, scores), len(boxes)
    for new in range(count, 2 * count - 1):
        one = int(left.match.argmin())
        if left.match[one] > threshold:
            break
        left.merge(one, int(left.partner[one]), new, average)
    return Merged(left.edges[left.stands], left.scores[left.stands], left.windows[left.stands])


class _Standing:
    """The boxes that are left, with room for all that come of them, and for each its best match of those behind it: the
    first of the best rows is then the first of the best pairs."""

    def __init__(self, boxes: Edges, scores: Edges) -> None:
        count = len(boxes)
        self.stands = np.arange(2 * count) < count
        self.edges, self.scores = np.zeros((2 * count, 4)), np.zeros(2 * count)
        self.edges[:count], self.scores[:count] = boxes, scores
        self.windows = np.ones(2 * count, np.int64)
        self.match, self.partner = np.full(2 * count, np.inf), np.zeros(2 * count, np.int64)
        for row in range(count):
            self._look_behind(row)

    def _look_behind(self, row: int) -> None:
        behind = row + 1 + np.flatnonzero(self.stands[row + 1 :])
        self.match[row] = np.inf
        if len(behind):
            found = match_score(self.edges[row], self.edges[behind])
            self.match[row], self.partner[row] = found.min(), behind[found.argmin()]

    def merge(self, one: int, two: int, new: int, average: Average) -> None:
        """Put the average of two boxes in the place `new`, behind all others."""
        self.stands[[one, two]], self.match[[one, two]] = False, np.inf
        weights = (1.0, 1.0) if average == "paper" else (self.scores[one], self.scores[two])
        self.edges[new] = (weights[0] * self.edges[one] + weights[1] * self.edges[two]) / sum(weights)
        self.scores[new] = self.scores[one] + self.scores[two]
        self.windows[new] = self.windows[one] + self.windows[two]
        before = np.flatnonzero(self.stands)
        for row in before[np.isin(self.partner[before], [one, two])]:
            self._look_behind(int(row))
        self.stands[new] = True
        found = match_score(self.edges[before], self.edges[new])
        better = found < self.match[before]
        self.match[before[better]], self.partner[before[better]] = found[better], new
