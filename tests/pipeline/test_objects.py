"""The one reader of boxes: what each of its users makes of entries with faults, all of them in one json."""

import json

import numpy as np
import pytest

from pipeline.objects import boxes_of, labels_of, objects_of
from pipeline.shards import Sample

GOOD = {"label": "red", "xyxy": [1, 2, 5, 9]}
NAMELESS = {"xyxy": [0, 0, 3.5, 4]}
FLAT = {"label": "blue", "xyxy": [4, 4, 4, 9]}
TURNED = {"label": "blue", "xyxy": [5, 9, 1, 2]}
NOWHERE = {"label": "green"}
NUMBERED = {"label": 7, "xyxy": [0, 0, 2, 2]}
ENTRIES = [
    GOOD, NAMELESS, FLAT, TURNED, NOWHERE, NUMBERED, "red", None, {"label": "red", "xyxy": 4},
    {"label": "red", "xyxy": [1, 2, 5]}, {"label": "red", "xyxy": [1, 2, float("nan"), 9]},
    {"label": "red", "xyxy": [1, 2, "wide", 9]}, {"label": None, "xyxy": [1, 2, 3, 4]},
]  # fmt: skip


def sample(text: bytes) -> Sample:
    return Sample("k", "val-0.tar", None, {"json": text})


ALL = sample(json.dumps({"boxes": ENTRIES}).encode())


def test_objects_have_an_area_and_a_known_class_and_the_others_a_reason():
    found = objects_of(ALL, ("blue", "red"))
    assert found.boxes.tolist() == [[2, 1, 9, 5]]
    assert found.labels.tolist() == [1]
    reasons = [reason for _, reason in found.refused]
    assert reasons == [
        "no_box", "no_area", "no_area", "no_box", "unknown_class", "no_box", "no_box", "no_box", "no_box", "no_area",
        "no_box", "no_box",
    ]  # fmt: skip
    assert [entry for entry, _ in found.refused][:5] == ENTRIES[1:6]
    assert objects_of(ALL, ("red", "7")).labels.tolist() == [0, 1]


def test_boxes_have_an_area_and_need_no_class():
    assert boxes_of(ALL).tolist() == [[2, 1, 9, 5], [0, 0, 4, 3.5], [0, 0, 2, 2], [2, 1, 4, 3]]


def test_classes_are_those_of_all_entries():
    assert labels_of(ALL) == ["7", "blue", "green", "red"]


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"3", b"\xff", b"{}", b'{"boxes": {"a": 1}}', b'{"boxes": []}'])
def test_a_json_without_boxes_has_none(text):
    found = objects_of(sample(text), ("red",))
    assert (len(found), found.refused) == (0, [])
    assert np.array_equal(boxes_of(sample(text)), np.zeros((0, 4)))
    assert labels_of(sample(text)) == []
