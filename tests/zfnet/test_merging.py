"""Greedy merging against the paper's steps, written out; overlaps against torchvision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from zfnet.merging import area, greedy_merge, intersection, iou, match_score

# Few places and sizes: equal boxes, equal scores and ties of every kind are common.
COARSE = st.tuples(*(st.integers(0, 6),) * 2, *(st.integers(1, 4),) * 2, st.sampled_from([0.25, 0.5, 1.0]))
FINE = st.tuples(*(st.floats(0, 100),) * 2, *(st.floats(1, 60),) * 2, st.floats(0.01, 1))
WINDOWS = st.lists(COARSE, max_size=14) | st.lists(FINE, max_size=14)


def score_of(b1, b2):
    """The paper's, with the second term turned round: distance of centres, and what is not shared."""
    distance = math.sqrt(sum(((b1[i] + b1[i + 2]) / 2 - (b2[i] + b2[i + 2]) / 2) ** 2 for i in (0, 1)))
    diagonals = [math.sqrt((b[2] - b[0]) ** 2 + (b[3] - b[1]) ** 2) for b in (b1, b2)]
    rows = max(0, min(b1[2], b2[2]) - max(b1[0], b2[0]))
    cols = max(0, min(b1[3], b2[3]) - max(b1[1], b2[1]))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (b1, b2)]
    return distance / (sum(diagonals) / 2) + (1 - rows * cols / (sum(areas) - rows * cols))


def naive_merge(boxes, threshold, average):
    """Section 4.3: (d) repeat (e) the best pair (f) stop above t (g) B = B \\ {b1, b2} + merge(b1, b2)."""
    boxes = [(tuple(edges), score, 1) for edges, score in boxes]
    while len(boxes) > 1:
        pairs = [(score_of(b1[0], b2[0]), i, j) for i, b1 in enumerate(boxes) for j, b2 in enumerate(boxes) if i < j]
        best, i, j = min(pairs)
        if best > threshold:
            break
        (e1, s1, n1), (e2, s2, n2) = boxes[i], boxes[j]
        w1, w2 = (1, 1) if average == "paper" else (s1, s2)
        merged = tuple((w1 * x + w2 * y) / (w1 + w2) for x, y in zip(e1, e2, strict=True))
        boxes = [box for k, box in enumerate(boxes) if k not in (i, j)] + [(merged, s1 + s2, n1 + n2)]
    return boxes


@settings(max_examples=200)
@given(WINDOWS, st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.0]), st.sampled_from(["paper", "confidence"]))
def test_merging_follows_the_papers_steps(windows, threshold, average):
    boxes = np.array([[top, left, top + h, left + w] for top, left, h, w, _ in windows], float).reshape(-1, 4)
    scores = np.array([score for *_, score in windows])
    expected = naive_merge(list(zip(boxes.tolist(), scores.tolist(), strict=True)), threshold, average)
    found = greedy_merge(boxes, scores, threshold, average)
    # The same sums in the same order: equal to the last bit, so that ties are broken alike.
    assert found.boxes.tolist() == [list(edges) for edges, _, _ in expected]
    assert found.scores.tolist() == [score for _, score, _ in expected]
    assert found.windows.tolist() == [number for _, _, number in expected]


def test_what_is_merged_is_accounted_for():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 100, (300, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 50, (300, 2))], 1)
    scores = rng.uniform(0.01, 1, 300)
    found = greedy_merge(boxes, scores, 0.7)
    assert found.windows.sum() == 300
    np.testing.assert_allclose(found.scores.sum(), scores.sum())
    again = greedy_merge(boxes, scores, 0.7)
    assert np.array_equal(again.boxes, found.boxes)
    assert 1 < len(found.boxes) < 300
    pairs = match_score(found.boxes[:, None], found.boxes[None])
    assert pairs[np.triu_indices(len(pairs), 1)].min() > 0.7


def test_three_windows_of_one_object_and_one_of_another():
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [50, 50, 60, 60], [0, 2, 10, 12]], float)
    found = greedy_merge(boxes, np.array([1.0, 1.0, 0.5, 2.0]), 0.8)
    assert found.boxes.tolist() == [[50, 50, 60, 60], [0.25, 1.25, 10.25, 11.25]]
    assert found.scores.tolist() == [0.5, 4.0]
    assert found.windows.tolist() == [1, 3]


def test_the_papers_average_gives_the_last_window_half_the_weight():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [0, 4, 10, 14]], float)
    assert greedy_merge(boxes, np.ones(3), 1.0, "paper").boxes.tolist() == [[0, 2, 10, 12]]
    np.testing.assert_allclose(greedy_merge(boxes, np.ones(3), 1.0).boxes, [[0, 4 / 3, 10, 10 + 4 / 3]])


def test_disjoint_boxes_match_worse_than_equal_ones():
    """The paper's sum, taken literally, would prefer disjoint boxes: the intersection's area raises it."""
    box, near, far = (np.array([0.0, left, 10, left + 10]) for left in (0, 2, 40))
    assert match_score(box, box) == 0
    assert match_score(box, near) < match_score(box, far)
    assert match_score(box, far) > 1


def test_no_boxes_and_bad_boxes():
    assert greedy_merge(np.zeros((0, 4)), np.zeros(0), 1).boxes.shape == (0, 4)
    assert greedy_merge(np.array([[0, 0, 1, 1.0]]), np.ones(1), 1).windows.tolist() == [1]
    for edges, score in (([5, 0, 5, 9], 1), ([0, 0, 5, 9], 0)):
        with pytest.raises(ValueError, match="have an area and a score above 0"):
            greedy_merge(np.array([edges], float), np.array([score], float), 1)


@given(st.lists(COARSE, min_size=1, max_size=8), st.lists(COARSE, min_size=1, max_size=8))
def test_overlaps_are_torchvisions(some, others):
    one, other = (
        np.array([[top, left, top + h, left + w] for top, left, h, w, _ in each], float) for each in (some, others)
    )
    xyxy = [torch.from_numpy(boxes[:, [1, 0, 3, 2]]) for boxes in (one, other)]
    np.testing.assert_allclose(iou(one[:, None], other[None]), box_iou(*xyxy), rtol=1e-12)
    shared = intersection(one[:, None], other[None])
    np.testing.assert_allclose(iou(one[:, None], other[None]), shared / (area(one)[:, None] + area(other) - shared))


def test_a_box_turned_inside_out_has_no_area_and_overlaps_nothing():
    inside_out, box = np.array([5.0, 5, 2, 9]), np.array([0.0, 0, 10, 10])
    assert area(inside_out) == 0
    assert iou(inside_out, box) == 0
    assert iou(inside_out, inside_out) == 0
