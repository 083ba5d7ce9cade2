"""Scenes: repeatable, exactly boxed, objects apart, and no shortcut to where they are."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.sources.scenes import Scenes
from zfnet.merging import iou

SOURCE = Scenes(train=40, val=8, objects=(2, 5))


@pytest.fixture(scope="module")
def samples():
    return [SOURCE.sample("train", number) for number in range(40)]


def edges(sample):
    return np.array([[box["xyxy"][i] for i in (1, 0, 3, 2)] for box in sample["json"]["boxes"]], float)


def test_a_sample_depends_on_seed_split_and_number_alone(samples):
    assert Scenes(train=900, val=0, objects=(2, 5)).sample("train", 7) == samples[7]
    assert SOURCE.sample("val", 7)["jpg"] != samples[7]["jpg"]
    assert Scenes(seed=1, objects=(2, 5)).sample("train", 7)["jpg"] != samples[7]["jpg"]


def test_there_are_as_many_objects_as_asked_where_there_is_room(samples):
    counts = [len(sample["json"]["boxes"]) for sample in samples]
    assert {2, 3, 4, 5} >= set(counts) - {1}
    assert np.mean(counts) > 2.2
    single = Scenes(objects=(1, 1))
    assert all(len(single.sample("train", number)["json"]["boxes"]) == 1 for number in range(10))


def test_boxes_are_those_of_the_mask_and_the_class_is_the_first_objects(samples):
    for number, sample in enumerate(samples):
        mask = np.asarray(Image.open(io.BytesIO(sample["mask.png"]))) > 0
        inside = np.zeros_like(mask)
        for (left, top, right, bottom), label in ((box["xyxy"], box["label"]) for box in sample["json"]["boxes"]):
            inside[top:bottom, left:right] = True
            part = mask[top:bottom, left:right]
            assert part[0].any() and part[-1].any() and part[:, 0].any() and part[:, -1].any()  # noqa: PT018
            assert label in SOURCE.classes
        assert not (mask & ~inside).any()
        assert Image.open(io.BytesIO(sample["jpg"])).size == mask.shape[::-1]
        assert sample["cls"] == number % 12
        assert sample["json"]["boxes"][0]["label"] == SOURCE.classes[number % 12]


def test_objects_do_not_touch(samples):
    for sample in samples:
        causes = sample["json"]["objects"]
        for i, one in enumerate(causes):
            for other in causes[:i]:
                apart = np.hypot(*np.subtract(one["centre_xy_px"], other["centre_xy_px"]))
                assert apart > 1.5 * (one["radius_px"] + other["radius_px"])


def test_sizes_and_places_vary_so_that_a_centred_box_is_wrong():
    single = Scenes(objects=(1, 1), radius=(0.1, 0.31))
    boxes = []
    for number in range(120):
        sample = single.sample("val", number)["json"]
        boxes.append(edges({"json": sample})[0] / np.tile([sample["height"], sample["width"]], 2))
    boxes = np.array(boxes)
    half = (boxes[:, 2:] - boxes[:, :2]).mean(0) / 2
    centred = np.concatenate([0.5 - half, 0.5 + half])
    assert (iou(centred, boxes) < 0.5).mean() >= 0.6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objects": (0, 2)}, "objects is"),
        ({"objects": (3, 2)}, "objects is"),
        ({"radius": (0.3, 0.2)}, "radius is"),
        ({"radius": (0.1, 0.4)}, "from 0.05 to 0.31"),
        ({"train": -1}, "train is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_refuses_what_cannot_be_drawn(given, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**given)


def test_refuses_what_it_has_not():
    with pytest.raises(ValueError, match=r"split is 'test'; expected one of train, val"):
        SOURCE.sample("test", 0)
    with pytest.raises(IndexError, match="'val' has 8 images"):
        SOURCE.sample("val", 8)


def test_about_names_everything_that_decides_the_content():
    assert SOURCE.about() != Scenes(train=40, val=8).about()
    assert SOURCE.about() == {
        "name": "scenes",
        "version": 1,
        "seed": 0,
        "train": 40,
        "val": 8,
        "objects": [2, 5],
        "radius": [0.1, 0.25],
    }


def test_the_command_refuses_in_its_own_words(tmp_path):
    from pipeline.shards import BadShards
    from pipeline.sources import commands

    with pytest.raises(BadShards, match=r"--radius is \(0.1, 0.4\)"):
        commands.run(commands.Scenes(out=str(tmp_path / "out"), radius=(0.1, 0.4)))
    assert commands.run(commands.Scenes(out=str(tmp_path / "out"), train=3, val=2)) == 0
    assert (tmp_path / "out" / "index.json").exists()
