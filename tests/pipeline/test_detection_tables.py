"""The tables of localisation and detection: each from a network that knows, one that does not, and a real one."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from pipeline import sweep
from pipeline.analyses import detection, localization
from pipeline.box_loop import BACKGROUND
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.runs import Run, RunError
from pipeline.sources.rendered import CLASSES
from tests.pipeline.boxed import SOURCE, drawn, save_network, scenes, write
from tests.pipeline.exact import assert_same
from zfnet import images
from zfnet.localization import Looker, Seen, merged, top_classes
from zfnet.merging import iou

LOCALIZATION = ("localization", "localization_images", "localization_windows")
DETECTION = ("detection", "detection_objects", "detection_windows", "detection_curves", "detection_classes")
WITH_BACKGROUND = (*CLASSES, BACKGROUND)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("boxed") / "scenes", train=2, val=10)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("boxed") / "run", "overfeat_fast_small+boxes", WITH_BACKGROUND)


@pytest.fixture
def run(network, tmp_path):
    shutil.copytree(network, tmp_path / "run")
    return tmp_path / "run"


def make(analysis, run, data, num=0, name=None, split="val", max_skipped=0.01, **config):
    options = Options(
        run=str(run), data=str(data), name=name, split=split, max_skipped=max_skipped, workers=Workers(num=num, cpus=2)
    )
    given = {"scales": (1, 3), "part_size": 4, "batch_size": 3, **config}
    return sweep.run(analysis.ANALYSIS, options, analysis.Config(**given)), options


def table(run, name):
    return pd.read_parquet(run / "results" / name)


def truth(number):
    """Edges and classes of the objects of a drawn scene."""
    boxes = SOURCE.sample("val", number)["json"]["boxes"]
    edges = [[box["xyxy"][i] for i in (1, 0, 3, 2)] for box in boxes]
    return np.array(edges, float), [CLASSES.index(box["label"]) for box in boxes]


def knowing(monkeypatch, said):
    """Windows that say what `said` makes of each image's (edges, classes); images are told apart by their pixels."""
    known = {}

    def views(self, resized, original):
        return [original]

    def look(self, views):
        edges, classes = known[views[0]]
        return [said(edges, classes)]

    monkeypatch.setattr(Looker, "views", views)
    monkeypatch.setattr(Looker, "look", look)
    for number in range(10):
        sample = SOURCE.sample("val", number)["json"]
        size = sample["width"], sample["height"]
        assert size not in known
        known[size] = truth(number)


def sure(edges, classes, confidence=0.9):
    """A window for each object that is sure of it, and one of the background."""
    confidences = np.full((len(classes) + 1, len(WITH_BACKGROUND)), (1 - confidence) / len(CLASSES))
    confidences[np.arange(len(classes)), classes] = confidence
    confidences[-1, -1] = 0.99
    boxes = np.concatenate([edges, [[0, 0, 128, 128]]])
    return Seen(1, boxes, confidences, boxes)


def test_a_network_that_knows_finds_everything(run, data, monkeypatch, capsys):
    knowing(monkeypatch, sure)
    assert make(detection, run, data)[0] == 0
    objects = table(run, "detection_objects")
    found, classes, curves = (table(run, name) for name in ("detection", "detection_classes", "detection_curves"))
    assert len(found) == len(objects) == sum(len(truth(n)[1]) for n in range(10))
    assert set(found.outcome) == {"right"}
    assert set(objects.fate) == {"found"}
    assert found.iou.min() == pytest.approx(1)
    known = classes[classes.objects > 0]
    assert (known.average_precision == 1).all()
    assert (known.objects_found == known.objects).all()
    assert classes[classes.objects == 0].average_precision.isna().all()
    assert (curves.groupby("class").recall.max() == 1).all()
    assert (curves.precision == 1).all()
    assert f"mAP 100.0% over {len(known)} classes" in capsys.readouterr().out
    # The same boxes as in the json: its edges are left, top, right, bottom.
    for key, some in objects.groupby("key"):
        edges, labels = truth(int(key[4:]))
        assert some["class"].tolist() == labels
        sides = np.stack(
            [some.box_top, some.box_left, some.box_top + some.box_height, some.box_left + some.box_width], 1
        )
        assert sides.tolist() == edges.tolist()


def test_what_goes_wrong_is_counted(run, data, monkeypatch):
    """Every box is twice as high, and the first object of an image is taken for another class."""

    def said(edges, classes):
        high = edges * [1, 1, 1, 1] + [0, 0, 1, 0] * (edges[:, 2] - edges[:, 0])[:, None] * 1.5
        return sure(np.concatenate([edges[:1], high[1:]]), [(classes[0] + 1) % 12, *classes[1:]])

    knowing(monkeypatch, said)
    make(detection, run, data)
    found, objects = table(run, "detection"), table(run, "detection_objects")
    first = objects[objects.object == 0]
    assert set(first.fate) <= {"confused_class", "poor_overlap"}
    assert set(objects[objects.object > 0].fate) <= {"poor_overlap", "confused_class"}
    assert set(found.outcome) <= {"confused_class", "poor_overlap"}
    classes = table(run, "detection_classes")
    assert (classes.average_precision.dropna() == 0).all()
    assert classes[["right", "duplicate", "poor_overlap", "confused_class", "background"]].to_numpy().sum() == len(
        found
    )
    fates = [f"objects_{name}" for name in ("found", "confused_class", "poor_overlap", "missed")]
    assert classes[fates].to_numpy().sum() == len(objects)


def test_localisation_is_right_where_class_and_box_are(run, data, monkeypatch, capsys):
    knowing(monkeypatch, sure)
    assert make(localization, run, data)[0] == 0
    assert "localisation error 0.0% of 10 images" in capsys.readouterr().out
    images, guesses = table(run, "localization_images"), table(run, "localization")
    assert set(images.outcome) == {"right"}
    assert images.iou.min() == pytest.approx(1)
    assert (guesses.groupby("key")["rank"].max() <= 5).all()
    assert not (guesses.class_name == BACKGROUND).any()
    assert (guesses.groupby("key")["class"].nunique() == guesses.groupby("key").size()).all()
    # The centred box: mean height and width, as shares of the images', of the objects of the images' classes.
    shares, own = [], {}
    for number in range(10):
        facts = SOURCE.sample("val", number)["json"]
        edges, labels = truth(number)
        own[f"val-{number:06d}"] = (edges[np.array(labels) == number % 12], facts["height"], facts["width"])
        shares += [(edge[2:] - edge[:2]) / (facts["height"], facts["width"]) for edge in own[f"val-{number:06d}"][0]]
    half = np.mean(shares, 0) / 2
    for row in images.itertuples():
        boxes, height, width = own[row.key]
        box = np.concatenate([0.5 - half, 0.5 + half]) * [height, width, height, width]
        assert row.centred_iou == pytest.approx(iou(box[None], boxes).max())
        shown = [row.box_top, row.box_left, row.box_top + row.box_height, row.box_left + row.box_width]
        guess = guesses[(guesses.key == row.key) & (guesses["class"] == row.label)].iloc[0]
        edges = np.array(
            [guess.box_top, guess.box_left, guess.box_top + guess.box_height, guess.box_left + guess.box_width]
        )
        assert iou(np.array(shown), edges) == iou(boxes, edges[None]).max() == pytest.approx(row.iou)
        assert shown in boxes.tolist()


def test_an_images_object_is_the_one_that_a_guess_comes_nearest_to():
    truths, boxes = np.array([[0.0, 0, 9, 9], [10, 10, 20, 30]]), np.array([[10.0, 10, 20, 25], [50, 50, 60, 60]])
    assert list(localization._nearest(truths, boxes).values()) == [10, 10, 10, 20]
    assert list(localization._nearest(truths, boxes[:0]).values()) == [0, 0, 9, 9]
    assert set(localization._nearest(truths[:0], boxes).values()) == {None}


def test_localisation_errors_have_their_kind(run, data, monkeypatch):
    def said(edges, classes):
        return sure(edges + np.array([0, 0, 300, 0]), classes)

    knowing(monkeypatch, said)
    make(localization, run, data)
    assert set(table(run, "localization_images").outcome) == {"poor_overlap"}
    monkeypatch.undo()
    knowing(monkeypatch, lambda edges, classes: sure(edges, [min({*range(12)} - {*classes})] * len(classes), 0.97))
    make(localization, run, data, name="other")
    assert set(table(run, "localization_images-other").outcome) == {"confused_class"}
    monkeypatch.undo()
    knowing(monkeypatch, lambda edges, classes: sure(edges, classes, 0.03))
    make(localization, run, data, name="none", least=0.5)
    assert set(table(run, "localization_images-none").outcome) == {"missed"}
    assert len(table(run, "localization-none")) == 0


def test_windows_that_are_told_of_are_those_that_were_merged(run, data):
    make(localization, run, data, least=0.1)
    guesses, windows = table(run, "localization"), table(run, "localization_windows")
    best = guesses[guesses["rank"] == 1].set_index("key")
    assert len(windows)
    for key, some in windows.groupby("key"):
        assert set(some["class"]) == {best.loc[key, "class"]}
        assert (some.confidence >= 0.1).all()
        assert best.loc[key, "windows"] <= len(some)
        assert (some.window_height > 0).all()


def test_the_mirror_images_windows_are_merged_with_the_others(run, data):
    make(localization, run, data)
    make(localization, run, data, name="both", mirror=True)
    one, both = (table(run, f"localization_windows{name}") for name in ("", "-both"))
    assert not one.mirrored.any()
    assert 0 < both.mirrored.sum() < len(both)
    assert not both.duplicated(["key", "scale", "mirrored", "window_top", "window_left"]).any()
    guesses = [table(run, f"localization{name}") for name in ("", "-both")]
    assert guesses[1].windows.max() > guesses[0].windows.max()


def test_windows_of_a_detection_are_the_sure_ones_each_once(data, tmp_path):
    """Against the looker's own windows: all that are sure of a class of the image's boxes, for the surest of these."""
    for head in ("boxes", "class-boxes"):
        run = save_network(tmp_path / head, f"overfeat_fast_small+{head}", WITH_BACKGROUND)
        make(detection, run, data, least=0.085)
        found, windows = table(run, "detection"), table(run, "detection_windows")
        model = Run.at(str(run)).load_model()
        looker = Looker(model.network, model.preprocessing, (1, 3), "fine")
        several = 0
        for number in (0, 7):
            key = f"val-{number:06d}"
            classes = sorted(set(found[found.key == key]["class"]))
            several += len(classes) > 1
            expected = []
            for one in _seen(looker, number):
                for place, confidences in enumerate(one.confidences):
                    class_ = max(classes, key=lambda c: (confidences[c], -c))
                    if confidences[class_] >= 0.085:
                        sides = np.concatenate([one.windows[place], one.of(class_)[place]])
                        expected.append([one.scale, class_, confidences[class_], *sides])
            rows = windows[windows.key == key]
            edges = [
                rows[f"{of}_{side}"] + (rows[f"{of}_{origin}"] if origin else 0)
                for of in ("window", "box")
                for side, origin in (("top", ""), ("left", ""), ("height", "top"), ("width", "left"))
            ]
            assert expected
            np.testing.assert_allclose(np.stack([rows.scale, rows["class"], rows.confidence, *edges], 1), expected)
        assert several


def _seen(looker, number):
    image = images.decode(SOURCE.sample("val", number)["jpg"])
    return looker.look(looker.views({side: images.resize(image, side) for side in looker.sides_px}, image.size))


def test_the_tables_are_what_the_windows_say_merged(run, data):
    """Against the looker's own windows, image by image."""
    make(localization, run, data)
    model = Run.at(str(run)).load_model()
    looker = Looker(model.network, model.preprocessing, (1, 3), "fine")
    guesses = table(run, "localization")
    for number in (0, 7):
        seen = _seen(looker, number)
        found = merged(seen, [top_classes(one, 5, 12) for one in seen], 0.05, 0.6, "confidence")
        best = {}
        for class_, score in zip(found.classes.tolist(), found.scores.tolist(), strict=True):
            best[class_] = max(score, best.get(class_, 0))
        expected = sorted(best.items(), key=lambda pair: -pair[1])[:5]
        rows = guesses[guesses.key == f"val-{number:06d}"]
        assert list(zip(rows["class"], rows.score, strict=True)) == expected


@pytest.mark.parametrize(("analysis", "names"), [(localization, LOCALIZATION), (detection, DETECTION)])
def test_interrupted_and_in_other_batches_the_tables_are_the_same(
    network, data, tmp_path, monkeypatch, analysis, names
):
    runs = [tmp_path / name for name in ("whole", "stopped", "batches")]
    for copy in runs:
        shutil.copytree(network, copy)
    make(analysis, runs[0], data, least=0.1)
    look, calls = Looker.look, []

    def dies(self, views):
        calls.append(1)
        if len(calls) > 6:
            raise SweepFailed("the power went")
        return look(self, views)

    with monkeypatch.context() as patch:
        patch.setattr(Looker, "look", dies)
        with pytest.raises(SweepFailed, match="the power went"):
            make(analysis, runs[1], data, least=0.1)
    make(analysis, runs[1], data, least=0.1)
    make(analysis, runs[2], data, least=0.1, batch_size=1)
    assert_same(runs[0], runs[1], *names)
    assert_same(runs[0], runs[2], *names)


def test_bad_samples_are_skipped_and_bad_boxes_counted(run, tmp_path):
    samples = drawn("val", range(8))
    flat = json.loads(samples[1][1]["json"])
    count = len(flat["boxes"])
    flat["boxes"].append({"label": CLASSES[0], "xyxy": [5, 5, 5, 30]})
    samples[1][1]["json"] = json.dumps(flat).encode()
    samples[2][1]["jpg"] = b"no image"
    del samples[3][1]["json"]
    del samples[4][1]["cls"]
    data = write(tmp_path / "data", val=samples)
    assert make(localization, run, data)[0] == 3
    assert make(detection, run, data, max_skipped=0.2)[0] == 0
    images = table(run, "localization_images").set_index("key")
    assert "val-000002" not in images.index
    assert images.refused["val-000001"] == 1
    assert images.outcome.isna().sum() == 2  # without json; without a class
    assert images.loc["val-000003", "objects"] == 0
    objects = table(run, "detection_objects")
    assert (objects.key == "val-000001").sum() == count
    assert objects[objects.key == "val-000001"].refused.tolist() == [1] * count
    skipped = pd.concat(pd.read_parquet(path) for path in (run / "results" / "skipped").glob("*.parquet"))
    assert set(zip(skipped.table, skipped.key, skipped.reason, strict=True)) == {
        (name, "val-000002", "bad_image") for name in ("localization", "detection")
    }


def test_what_cannot_be_done_is_refused(run, data, make_run):
    with pytest.raises(RunError, match="no regressor of boxes: give one that jobs/train_localizer.py made"):
        make(localization, make_run(), data)
    with pytest.raises(RunError, match=r"--scales is \(3, 1\)"):
        make(localization, run, data, scales=(3, 1))
    for analysis in (localization, detection):
        with pytest.raises(RunError, match="--least is 1"):
            make(analysis, run, data, least=1.0)
    with pytest.raises(RunError, match="--threshold is -1"):
        make(detection, run, data, threshold=-1.0)


def test_detection_needs_a_background(data, tmp_path):
    plain = save_network(tmp_path / "plain", "overfeat_fast_small+boxes")
    with pytest.raises(RunError, match="no class 'background'"):
        make(detection, plain, data)
    assert make(localization, plain, data)[0] == 0


def test_the_forecast_writes_nothing(run, data, capsys):
    options = Options(run=str(run), data=str(data), plan=True, workers=Workers(num=0, cpus=2))
    assert sweep.run(detection.ANALYSIS, options, detection.Config(scales=(1, 2))) == 0
    assert "forwards  20" in capsys.readouterr().out
    assert not (run / "results").exists()


@pytest.mark.slow
def test_actors_give_the_same_tables(network, data, tmp_path, ray_cluster):
    runs = [tmp_path / name for name in ("alone", "actors")]
    for copy in runs:
        shutil.copytree(network, copy)
    make(detection, runs[0], data, least=0.1)
    make(detection, runs[1], data, num=2, least=0.1)
    assert_same(*runs, *DETECTION)
