"""The table object_occlusion: a network that sees one place alone, and each row against images hidden one by one."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import sweep
from pipeline.analyses import object_occlusion
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.indexing import index_shards
from pipeline.runs import Run, RunError
from tests.conftest import CLASSES, jpeg, load_index, random_model
from tests.pipeline.exact import assert_same
from tests.tars import write_tar
from zfnet import images, models
from zfnet.boxes import Box, elsewhere, mask
from zfnet.images import Preprocessing
from zfnet.tracing import trace

BOXES = {
    "boxed": [{"label": "red", "xyxy": [24, 16, 56, 40]}],
    "two": [{"label": "blue", "xyxy": [0, 0, 90, 70]}, {"label": "red", "xyxy": [30, 20, 50, 40]}],
    "large": [{"label": "red", "xyxy": [0, 0, 90, 60]}],
    "whole": [{"label": "red", "xyxy": [-5, -5, 200, 200]}],
    "other": [{"label": "blue", "xyxy": [24, 16, 56, 40]}],
    "outside": [{"label": "red", "xyxy": [0, 0, 2, 80]}],
    "flat": [{"label": "red", "xyxy": [24, 16, 24, 40]}],
    "odd": [{"label": "red", "xyxy": "none"}],
}


@pytest.fixture
def data(tmp_path):
    """Images of 80 x 96 pixels with boxes of every sort; one without json and one with broken json."""
    rng = np.random.default_rng(0)
    samples = [
        (key, {"jpg": jpeg(rng), "cls": b"0", "json": json.dumps({"boxes": boxes}).encode()})
        for key, boxes in BOXES.items()
    ]
    samples += [("none", {"jpg": jpeg(rng), "cls": b"0"}), ("torn", {"jpg": jpeg(rng), "cls": b"0", "json": b"{"})]
    samples += [("second", {"jpg": jpeg(rng), "cls": b"1"}), ("unlabelled", {"jpg": jpeg(rng)})]
    folder = tmp_path / "boxes"
    folder.mkdir()
    write_tar(folder / "val-000000.tar", samples)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(folder / "val-000000.tar")], str(folder), classes=None, accept_damaged=False)
    return folder


def occluded(run, data, num=0, **config):
    options = Options(run=str(run), data=str(data), workers=Workers(num=num, cpus=2))
    assert sweep.run(object_occlusion.ANALYSIS, options, object_occlusion.Config(places=3, **config)) == 0
    return pd.read_parquet(run / "results" / "object_occlusion").set_index("key")


def test_which_boxes_count(make_run, data):
    found = occluded(make_run(), data)
    assert len(found) == len(BOXES) + 3  # all that have a label
    assert set(found.index[found.object_top.notna()]) == {"boxed", "two", "large", "whole"}
    assert set(found.index[found.elsewhere_drop.notna()]) == {"boxed", "two", "large"}
    assert found.hidden_share[["boxed", "two"]].tolist() == [1, 1]
    assert 0 < found.hidden_share["large"] <= 896 / 3200  # 896 of 4096 pixels lie outside
    # 80 x 96 becomes 72 x 86.4, of which the middle 64 x 64 is seen: 0.9 times, less 4 rows and 11 columns
    where = ["object_top", "object_left", "object_height", "object_width"]
    assert found.loc["boxed", where].tolist() == [10, 10, 22, 30]
    assert (found.inside + found.outside > 0).all()


def hidden_one_by_one(run, key, data, masks, feature_map):
    """Probabilities and the map's summed activation, each image alone."""
    model = Run.at(str(run)).load_model()
    index = load_index(data)
    (sample,) = (s for s in index.read(index.split("val")) if s.key == key)
    pixels, _ = images.centre_crop(images.decode(sample.image), 72, 64)
    kept, scores = [], []
    model.network.relu5.register_forward_hook(lambda m, i, o: kept.append(float(o[0, feature_map].double().sum())))
    for hidden in [np.zeros((64, 64), bool), *masks]:
        image = np.where(hidden[..., None], np.uint8(124), pixels)
        with torch.no_grad():
            scores.append(model.network(model.preprocessing.normalise(torch.from_numpy(image)[None]))[0].softmax(0))
    return [float(score[0]) for score in scores], kept


@pytest.mark.parametrize("key", ["boxed", "two"])
def test_rows_against_images_hidden_one_by_one(make_run, data, key, monkeypatch):
    drawn = []

    def noted(box, *others):
        drawn.append((box, elsewhere(box, *others)))
        return drawn[-1][1]

    monkeypatch.setattr(object_occlusion, "elsewhere", noted)
    run = make_run()
    row = occluded(run, data, classes=("red",)).loc[key]
    box = Box(*(int(row[f"object_{side}"]) for side in Box._fields))
    (places,) = (places for of, places in drawn if of == box and places)
    assert len(places) == row.places == 3
    probability, activity = hidden_one_by_one(run, key, data, [mask(box, 64), *places], row.feature_map)
    assert row.target_class == 0
    assert row.clean_probability == pytest.approx(probability[0], rel=1e-5)
    assert row.object_drop == pytest.approx(probability[0] - probability[1], abs=1e-4)
    assert row.elsewhere_drop == pytest.approx(probability[0] - np.mean(probability[2:]), abs=1e-4)
    assert row.activity == pytest.approx(activity[0], rel=1e-5)
    assert row.object_activity_drop == pytest.approx(1 - activity[1] / activity[0], abs=1e-4)


class OnePlace(torch.nn.Module):
    """Sees the mean of the image's rows 20 to 30 and columns 20 to 30 alone; as a network of one convolution."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 64)
        self.relu = torch.nn.ReLU()
        self.flat = torch.nn.Flatten()
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[0, :, 20:30, 20:30] = 1e-4
            self.conv.bias.copy_(torch.tensor([4.0, 0.0]))  # so that its first map is active whatever it sees

    def forward(self, x):
        return self.flat(self.relu(self.conv(x)))


def test_a_network_that_sees_the_box_alone(tmp_path, data, monkeypatch):
    build = models.build
    monkeypatch.setattr(models, "build", lambda name, classes: OnePlace() if name == "place" else build(name, classes))
    run = tmp_path / "place"
    preprocessing = Preprocessing(resize_px=72, crop_px=64, mean=torch.full((3, 1, 1), 124.0))
    Run.at(str(run)).save_model(
        OnePlace(), architecture="place", classes=("a", "b"), preprocessing=preprocessing, about={}
    )
    found = occluded(run, data).loc["boxed"]  # its box is rows 10 to 31, columns 10 to 39
    assert found.target_class == found.clean_class == 0  # the network's classes are not the shards'
    assert found.feature_map == 0
    assert found.object_probability == pytest.approx(1 / (1 + np.exp(-4)))  # all that it sees is grey, which is 0
    assert abs(found.object_drop) > 1e-4
    assert found.elsewhere_drop == 0
    assert found.support_share == pytest.approx(50 / 64**2, abs=2 / 64**2)
    assert abs(found.inside_drop) > 2 * abs(found.outside_drop)


def test_workers_do_not_matter(make_run, data, ray_cluster):
    one, other = make_run("one"), make_run("other")
    occluded(one, data, part_size=2)
    occluded(other, data, num=2, part_size=2)
    assert_same(one, other, "object_occlusion")


def test_images_are_chosen_by_class_and_number(make_run, data):
    found = occluded(make_run(), data, classes=("red", "green"), per_class=3)
    assert found.index.tolist() == ["boxed", "two", "large", "second"]
    with pytest.raises(RunError, match="there is no class 'pink'"):
        occluded(make_run("again"), data, classes=("pink",))


def test_what_was_found_is_said(make_run, data, monkeypatch):
    run = make_run()
    found = occluded(run, data)
    said = "\n".join(object_occlusion.report(Run.at(str(run)), None))
    boxed = found[found.elsewhere_drop.notna()]
    assert f"3 of {len(found)} images have a box" in said
    assert f"as much elsewhere {boxed.elsewhere_drop.mean():.3f}" in said
    classes = boxed.groupby("label_name").object_drop.mean().sort_values(ascending=False)
    lines = said.splitlines()[1:]
    assert [line.split(", ")[0].removeprefix("object_occlusion: ") for line in lines] == list(classes.index)
    assert f"the object {classes.iloc[0]:.3f} of" in lines[0]
    monkeypatch.setattr(object_occlusion, "CLASSES_SAID", 0)
    assert len(list(object_occlusion.report(Run.at(str(run)), None))) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [({"support": 1}, "--support is 1"), ({"places": 0}, "--places is 0"), ({"grey": -1}, "--grey is -1")],
)
def test_refusals(config, words):
    with pytest.raises(RunError) as caught:
        object_occlusion.Config(**config)
    assert words in str(caught.value)


def test_images_without_labels_and_scores_that_are_not_finite_are_refused(tmp_path, make_run, data):
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    write_tar(folder / "val-000000.tar", [("one", {"jpg": jpeg(np.random.default_rng(0))})])
    index_shards([str(folder / "val-000000.tar")], str(folder), classes=None, accept_damaged=False)
    with pytest.raises(RunError, match="there is no image to make object_occlusion of"):
        occluded(make_run(), folder)
    network = random_model()
    with torch.no_grad():
        network.get_submodule(trace(network, (3, 64, 64)).layers[-1]).bias[1] = torch.inf
    preprocessing = Preprocessing(resize_px=72, crop_px=64)
    Run.at(str(tmp_path / "broken")).save_model(
        network, architecture="zfnet_small", classes=CLASSES, preprocessing=preprocessing, about={}
    )
    with pytest.raises(SweepFailed, match="sample 'boxed' gives activations or scores that are not finite"):
        occluded(tmp_path / "broken", data)
