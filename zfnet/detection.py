"""How well boxes were found: matches with the true ones, precision and recall, and what went wrong with the others.

The criterion of ImageNet's contests, which OverFeat's results are given in (sections 4 and 5): a box is right where its
class is, and its intersection over union with a true box of the class is at least one half. A true box is found once;
further boxes on it are wrong. Boxes are edges (top, left, bottom, right).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from zfnet.merging import Edges, iou

RIGHT = 0.5
"""Least intersection over union of a right box."""
NEAR = 0.1
"""Least intersection over union with an object of a box that is meant for it (Hoiem et al., ECCV 2012)."""

Ints = npt.NDArray[np.int64]
Outcome = Literal["right", "duplicate", "poor_overlap", "confused_class", "background"]
"""Of a detection: on an object of its class; on one that is found already; near one of its class, though not half on
it; on or near one of another class; on none."""
Fate = Literal["found", "confused_class", "poor_overlap", "missed"]
"""Of an object: found; half covered by a box of another class alone; near a box of its class; near none."""


def by_score(scores: Edges) -> Ints:
    """Places from the highest score down; equal ones in the order given."""
    found: Ints = np.argsort(-scores, kind="stable").astype(np.int64)
    return found


def match(boxes: Edges, scores: Edges, truths: Edges, least: float = RIGHT) -> Ints:
    """For each box of one image and class the true box that it finds, or -1.

    The highest score chooses first, among the true boxes that are not found yet that of the largest overlap.

    Args:
        boxes: [N, 4].
        scores: [N]
        truths: [M, 4].
        least: overlap of a right box.
    """
    found = np.full(len(boxes), -1, np.int64)
    if not len(truths):
        return found
    free = np.ones(len(truths), bool)
    overlap = iou(boxes[:, None], truths[None])
    for number in by_score(scores):
        best = int(np.where(free, overlap[number], -1).argmax())
        if free[best] and overlap[number, best] >= least:
            found[number], free[best] = best, False
    return found


def match_classes(boxes: Edges, scores: Edges, labels: Ints, truths: Edges, truth_labels: Ints) -> Ints:
    """`match` for each class of one image: places among all its true boxes [M, 4], or -1."""
    found = np.full(len(boxes), -1, np.int64)
    for label in np.unique(labels):
        mine, theirs = np.flatnonzero(labels == label), np.flatnonzero(truth_labels == label)
        matched = match(boxes[mine], scores[mine], truths[theirs])
        found[mine[matched >= 0]] = theirs[matched[matched >= 0]]
    return found


def outcomes(boxes: Edges, labels: Ints, truths: Edges, truth_labels: Ints, matched: Ints) -> list[Outcome]:
    """What each detection of one image is, given its match."""
    found: list[Outcome] = []
    overlap = iou(boxes[:, None], truths[None])
    for number, label in enumerate(labels):
        own = overlap[number, truth_labels == label].max(initial=0)
        other = overlap[number, truth_labels != label].max(initial=0)
        if matched[number] >= 0:
            found.append("right")
        elif own >= RIGHT:
            found.append("duplicate")
        elif max(own, other) < NEAR:
            found.append("background")
        else:
            found.append("poor_overlap" if own >= other else "confused_class")
    return found


def fates(boxes: Edges, labels: Ints, truths: Edges, truth_labels: Ints, matched: Ints) -> list[Fate]:
    """What became of each object of one image, given the matches of the detections."""
    found: list[Fate] = []
    overlap = iou(boxes[:, None], truths[None])
    for number, label in enumerate(truth_labels):
        own = overlap[labels == label, number].max(initial=0)
        other = overlap[labels != label, number].max(initial=0)
        if number in matched:
            found.append("found")
        elif other >= RIGHT:
            found.append("confused_class")
        else:
            found.append("poor_overlap" if own >= NEAR else "missed")
    return found


def precision_recall(right: npt.NDArray[np.bool_], objects: int) -> tuple[Edges, Edges]:
    """Precision and recall of the first 1, 2, ... detections of a class.

    Args:
        right: [N] whether each is, from the highest score of all images down.
        objects: true boxes of the class, above 0.
    """
    hits = np.cumsum(right)
    return hits / np.arange(1, len(right) + 1), hits / objects


def average_precision(precision: Edges, recall: Edges) -> float:
    """Area under the curve, precision at a recall being the highest at that recall or a larger one.

    As PASCAL VOC since 2010 and ImageNet's detection contest count it.
    """
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((highest * np.diff(recall, prepend=0)).sum())
