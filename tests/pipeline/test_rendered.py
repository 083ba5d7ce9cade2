"""The embedded data set: repeatable, exactly annotated, and without a shortcut to the class."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.sources.rendered import SHAPES, TEXTURES, Rendered

SOURCE = Rendered(train=48, val=24)


@pytest.fixture(scope="module")
def samples() -> list[dict]:
    return [SOURCE.sample("train", number) for number in range(48)]


def image(sample: dict) -> Image.Image:
    return Image.open(io.BytesIO(sample["jpg"]))


def mask(sample: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample["mask.png"])))


def test_classes_are_every_shape_with_every_texture() -> None:
    assert SOURCE.classes == [f"{shape} {texture}" for shape in SHAPES for texture in TEXTURES]
    assert len(SOURCE.classes) == 12
    assert SOURCE.splits == {"train": 48, "val": 24}


def test_a_sample_depends_on_seed_split_and_number_alone(samples) -> None:
    again = Rendered(train=1000, val=0)
    for number in (47, 3, 20):
        assert again.sample("train", number) == samples[number]
    assert SOURCE.sample("val", 3)["jpg"] != samples[3]["jpg"]
    assert Rendered(seed=1).sample("train", 3)["jpg"] != samples[3]["jpg"]


def test_keys_are_split_and_number(samples) -> None:
    assert samples[17]["__key__"] == "train-000017"
    assert SOURCE.sample("val", 0)["__key__"] == "val-000000"


def test_classes_are_balanced_and_named(samples) -> None:
    assert set(Counter(sample["cls"] for sample in samples).values()) == {4}
    for sample in samples:
        facts = sample["json"]
        assert facts["cls"] == sample["cls"]
        assert facts["label"] == SOURCE.classes[sample["cls"]] == f"{facts['shape']} {facts['texture']}"


def test_jpegs_are_rgb_of_the_size_stated_and_of_varied_aspect(samples) -> None:
    sizes = set()
    for sample in samples:
        picture = image(sample)
        assert (picture.format, picture.mode) == ("JPEG", "RGB")
        assert picture.size == (sample["json"]["width"], sample["json"]["height"])
        assert sample["json"]["mode"] == "RGB"
        assert all(128 <= side <= 256 for side in picture.size)
        sizes.add(picture.size)
    assert len(sizes) > 40


def test_box_is_the_masks_and_both_are_inside_the_central_square(samples) -> None:
    for sample in samples:
        object_ = mask(sample)
        height, width = object_.shape
        assert (width, height) == image(sample).size
        assert set(np.unique(object_)) == {0, 255}
        (box,) = sample["json"]["boxes"]
        assert box["label"] == sample["json"]["label"]
        rows, columns = np.nonzero(object_)
        assert box["xyxy"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        side = min(width, height)
        assert box["xyxy"][0] >= (width - side) // 2
        assert box["xyxy"][2] <= (width + side + 1) // 2
        assert box["xyxy"][1] >= (height - side) // 2
        assert box["xyxy"][3] <= (height + side + 1) // 2


def test_every_shape_has_the_area_of_the_disc(samples) -> None:
    for sample in samples:
        assert (mask(sample) > 0).sum() == pytest.approx(np.pi * sample["json"]["radius_px"] ** 2, rel=0.03)


def test_the_object_wears_its_two_colours(samples) -> None:
    for sample in samples:
        pixels = np.asarray(image(sample), float)[mask(sample) > 0]
        colours = np.array([list(bytes.fromhex(colour[1:])) for colour in sample["json"]["colours"]], float)
        # Every object pixel lies, but for grain and JPEG, on the line between the two colours: so does their mean.
        axis = colours[1] - colours[0]
        along = ((pixels - colours[0]) @ axis) / (axis @ axis)
        rest = pixels.mean(axis=0) - (colours[0] + along.mean() * axis)
        assert np.abs(rest).max() < 12
        assert 0.15 < along.mean() < 0.85
        assert along.std() > 0.25  # both are there: it is a texture


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_stay_within_0_and_1_and_repeat_with_their_period(texture) -> None:
    x = np.arange(60, dtype=np.float32)[None, :] + np.float32(0.3)
    y = np.arange(60, dtype=np.float32)[:, None] + np.float32(0.3)
    share = np.broadcast_to(TEXTURES[texture](x, y, 12.0), (60, 60))
    assert share.min() == 0
    assert share.max() == 1
    np.testing.assert_allclose(share[:, 12:], share[:, :-12], atol=1e-4)
    np.testing.assert_allclose(share[12:], share[:-12], atol=1e-4)


def test_colours_place_and_background_say_nothing_of_the_class() -> None:
    """Twenty images a class: means of the drawn numbers differ no more than chance has them differ."""
    facts = [Rendered().sample("train", number)["json"] for number in range(240)]
    for name, value in [
        ("radius", lambda f: f["radius_px"] / min(f["width"], f["height"])),
        ("x", lambda f: f["centre_xy_px"][0] / f["width"]),
        ("red", lambda f: bytes.fromhex(f["colours"][0][1:])[0]),
        ("background", lambda f: list(TEXTURES).index(f["background"]["texture"])),
        ("period", lambda f: f["period_px"] / f["radius_px"]),
    ]:
        values = np.array([value(f) for f in facts], float)
        classes = np.array([f["cls"] for f in facts])
        means = np.array([values[classes == cls].mean() for cls in range(12)])
        standard_error = values.std() / np.sqrt(20)
        assert np.abs(means - values.mean()).max() < 4 * standard_error, name


def test_json_is_plain(samples) -> None:
    for sample in samples:
        assert json.loads(json.dumps(sample["json"])) == sample["json"]
        assert type(sample["cls"]) is int


def test_about_names_everything_that_decides_the_content() -> None:
    assert SOURCE.about() != Rendered(train=48, val=24, seed=1).about()
    assert SOURCE.about() == Rendered(train=48, val=24).about()


def test_refuses_what_it_has_not() -> None:
    with pytest.raises(ValueError, match=r"split is 'test'; expected one of train, val"):
        SOURCE.sample("test", 0)
    with pytest.raises(IndexError, match="'val' has 24 images"):
        SOURCE.sample("val", 24)
    with pytest.raises(ValueError, match="val is -1"):
        Rendered(val=-1)
