"""Matches, precision and recall against the contest's rule written out, and against COCO's evaluation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zfnet.detection import (
    average_precision,
    by_score,
    fates,
    match,
    match_classes,
    outcomes,
    precision_recall,
)
from zfnet.merging import iou

BOX = st.tuples(*(st.integers(0, 8),) * 2, *(st.integers(1, 6),) * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)


def edges(boxes):
    return np.array(boxes, float).reshape(-1, 4)


def random_image(rng, classes=3):
    """Objects, and detections that are near them or anywhere."""
    corners = rng.uniform(0, 80, (rng.integers(0, 5), 2))
    truths = np.concatenate([corners, corners + rng.uniform(20, 40, corners.shape)], 1)
    labels = rng.integers(0, classes, len(truths))
    picked = rng.integers(0, len(truths), 8) if len(truths) else np.zeros(0, int)
    boxes = np.concatenate([truths[picked] + rng.normal(0, 3, (len(picked), 4)), [[1, 1, 20, 20], [50, 50, 90, 60]]])
    found = np.concatenate([np.where(rng.random(len(picked)) < 0.8, labels[picked], 0), [0, 1]]).astype(int)
    return boxes, rng.random(len(boxes)), found, truths, labels


@given(st.lists(BOX, max_size=6), st.lists(BOX, max_size=4), st.permutations(range(6)))
def test_a_true_box_is_found_once_by_the_highest_score(boxes, truths, order):
    scores = np.array(order[: len(boxes)], float)
    free, expected = set(range(len(truths))), {}
    for number in sorted(range(len(boxes)), key=lambda n: -scores[n]):
        candidates = [(iou(edges([boxes[number]]), edges([truths[t]]))[0], -t) for t in free]
        best = max(candidates, default=(0, 0))
        if candidates and best[0] >= 0.5:
            expected[number] = -best[1]
            free.remove(-best[1])
    found = match(edges(boxes), scores, edges(truths))
    assert found.tolist() == [expected.get(number, -1) for number in range(len(boxes))]


def test_equal_scores_are_taken_in_the_order_given():
    assert by_score(np.array([0.5, 0.9, 0.5, 0.9])).tolist() == [1, 3, 0, 2]


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 5))
def test_average_precision_is_the_area_under_the_highest_precision_from_each_recall_on(right, missed):
    objects = sum(right) + missed
    if not objects:
        return
    precision, recall = precision_recall(np.array(right), objects)
    area = 0.0
    for hit in range(1, sum(right) + 1):  # recall rises by 1 / objects at each hit
        area += max(p for p, r in zip(precision, recall, strict=True) if r >= hit / objects - 1e-12) / objects
    assert average_precision(precision, recall) == pytest.approx(area, abs=1e-12)


def test_known_answers():
    precision, recall = precision_recall(np.array([True, False, True]), 4)
    assert precision.tolist() == [1, 1 / 2, 2 / 3]
    assert recall.tolist() == [1 / 4, 1 / 4, 2 / 4]
    assert average_precision(precision, recall) == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision(*precision_recall(np.zeros(0, bool), 3)) == 0


def test_matches_and_curves_are_cocos():
    metric = pytest.importorskip("torchmetrics.detection").MeanAveragePrecision(
        box_format="xyxy", iou_thresholds=[0.5], class_metrics=True, backend="faster_coco_eval"
    )
    rng = np.random.default_rng(1)
    pooled, objects = {label: [] for label in range(3)}, np.zeros(3, int)
    for _ in range(40):
        boxes, scores, labels, truths, truth_labels = random_image(rng)
        matched = match_classes(boxes, scores, labels, truths, truth_labels)
        objects += np.bincount(truth_labels, minlength=3)
        for number, label in enumerate(labels):
            pooled[label].append((scores[number], matched[number] >= 0))
        as_xyxy = [torch.from_numpy(some[:, [1, 0, 3, 2]]) for some in (boxes, truths)]
        metric.update(
            [{"boxes": as_xyxy[0], "scores": torch.from_numpy(scores), "labels": torch.from_numpy(labels)}],
            [{"boxes": as_xyxy[1], "labels": torch.from_numpy(truth_labels)}],
        )
    expected = metric.compute()["map_per_class"].tolist()
    for label, rows in pooled.items():
        right = np.array([hit for _, hit in sorted(rows, reverse=True)])
        precision, recall = precision_recall(right, int(objects[label]))
        # COCO reads the curve at 101 recalls (torchmetrics in float32); ours is the area under it.
        at = [precision[recall >= r].max(initial=0) for r in torch.linspace(0, 1, 101).tolist()]
        assert np.mean(at) == pytest.approx(expected[label], abs=1e-6)
        assert average_precision(precision, recall) == pytest.approx(expected[label], abs=0.01)


def test_what_went_wrong_is_named():
    truths, truth_labels = edges([[0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]]), np.array([0, 1, 1])
    boxes = edges([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [54, 54, 64, 64], [20, 70, 30, 80]])
    labels = np.array([0, 0, 0, 1, 1])
    matched = match_classes(boxes, np.array([0.9, 0.8, 0.7, 0.6, 0.5]), labels, truths, truth_labels)
    assert matched.tolist() == [0, -1, -1, -1, -1]
    assert outcomes(boxes, labels, truths, truth_labels, matched) == [
        "right",
        "duplicate",
        "confused_class",
        "poor_overlap",
        "background",
    ]
    assert fates(boxes, labels, truths, truth_labels, matched) == ["found", "confused_class", "missed"]
    poor = np.array([3])
    assert fates(boxes[poor], labels[poor], truths, truth_labels, matched[poor])[1] == "poor_overlap"


def test_no_detections_and_no_objects():
    none, labels = edges([]), np.zeros(0, int)
    assert match_classes(none, np.zeros(0), labels, none, labels).tolist() == []
    one = edges([[0, 0, 1, 1]])
    assert outcomes(one, np.array([0]), none, labels, np.array([-1])) == ["background"]
    assert fates(none, labels, one, np.array([0]), labels) == ["missed"]
