"""Training of a regressor of boxes and of a detector: what is trained, exact resume, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import train_boxes
from pipeline.box_loop import BACKGROUND, METRICS, BoxTrainer, DetectorTrainer, Windows, _iou
from pipeline.cluster import Workers
from pipeline.runs import Run, RunError
from pipeline.sources.rendered import CLASSES
from pipeline.train_boxes import Detector, Localizer, run_detector, run_localizer
from tests.pipeline.boxed import drawn, save_network, scenes, write
from zfnet.merging import iou

PLACE = {"rank": 0, "world": 1, "device": "cpu", "decoders": 0, "checkpoint_steps": 100, "keep_epochs": ()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("boxed") / "scenes")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("boxed") / "classifier")


def options(kind, run, source, data, **more):
    given = {"epochs": 2, "batch": 8, "workers": Workers(num=0), "decoders": 0, "scales": (1, 3), "lr": 1e-3}
    return kind(run=str(run), source=str(source), data=str(data), **{**given, **more})


def train(kind, *given, **more):
    run = run_localizer if kind is Localizer else run_detector
    return run(options(kind, *given, **more))


def tensors(run):
    return Run.at(str(run)).load_model().network.state_dict()


def metrics(run):
    timed = ["images_per_second", "data_wait_share", "seconds"]
    return pd.read_parquet(run / "metrics").drop(columns=timed)


def test_a_localizer_is_its_source_with_a_regressor(classifier, data, tmp_path, capsys):
    run = tmp_path / "boxes"
    assert train(Localizer, run, classifier, data) == 0
    assert "epoch 2/2" in capsys.readouterr().out
    model = Run.at(str(run)).load_model()
    assert model.architecture == "overfeat_fast_small+boxes"
    assert model.classes == CLASSES
    before, after = tensors(classifier), tensors(run)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["regressor.edges.weight"].abs().max() > 5e-3  # they began at a deviation of 0.001
    found = metrics(run)
    assert found.columns.tolist() == [name for name in METRICS.names if name in found]
    assert found.train_loss.iloc[1] < found.train_loss.iloc[0]
    assert json.loads((run / "run.json").read_text())["training"]["source_model_id"]
    assert train(Localizer, run, classifier, data) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_detector_begins_as_its_source_with_one_class_more(classifier, data, tmp_path):
    plan = detector_plan(classifier, data, tmp_path, context="lower")
    trainer = DetectorTrainer(plan, **PLACE)
    network, source = trainer._first_network().state_dict(), tensors(classifier)
    assert network["fc8.weight"].shape[0] == len(CLASSES) + 1
    assert torch.equal(network["fc8.weight"][:-1], source["fc8.weight"])
    assert not network["fc8.weight"][-1].any()
    assert not network["context.weight"].any()
    assert all(torch.equal(network[name], source[name]) for name in source if not name.startswith("fc8"))
    run = tmp_path / "detector"
    assert train(Detector, run, classifier, data, context="lower") == 0
    model = Run.at(str(run)).load_model()
    assert model.classes == (*CLASSES, BACKGROUND)
    assert model.architecture == "overfeat_fast_small+context"
    after = tensors(run)
    assert not torch.equal(after["conv1.weight"], source["conv1.weight"])
    assert after["context.weight"].abs().max() > 0
    boxes = tmp_path / "boxes"
    assert train(Localizer, boxes, run, data, boxes="per-class") == 0
    assert Run.at(str(boxes)).load_model().architecture == "overfeat_fast_small+context+class-boxes"


def detector_plan(classifier, data, tmp_path, **more):
    given = options(Detector, tmp_path / "plan", classifier, data, **more)
    model = Run.at(str(classifier)).load_model()
    architecture = model.architecture + ("+context" if given.context == "lower" else "")
    known = train_boxes._plan(given, model, architecture, train_boxes._recipe(given))
    return train_boxes.DetectorPlan(**known, negatives=given.negatives, mining=given.mining)


@pytest.mark.parametrize(("kind", "more"), [(Localizer, {}), (Detector, {"context": "lower"})])
@pytest.mark.parametrize("when", [2, 4])  # of 3 steps an epoch: inside the first, inside the second
def test_a_training_that_was_stopped_ends_with_the_same_bits(classifier, data, tmp_path, monkeypatch, kind, more, when):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(kind, whole, classifier, data, **more)
    finish = BoxTrainer._checkpoint

    def dies(self, *, inside):
        finish(self, inside=inside)
        if self.step == when:
            raise RunError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(BoxTrainer, "_checkpoint", dies)
        with pytest.raises(RunError, match="the power went"):
            train(kind, stopped, classifier, data, checkpoint_steps=2, **more)
    assert not (stopped / "run.json").exists()
    with pytest.raises(RunError, match=r"holds another training .*scales"):
        train(kind, stopped, classifier, data, **{**more, "scales": (2,)})
    assert train(kind, stopped, classifier, data, **more) == 0
    assert Run.at(str(whole)).load_model().model_id == Run.at(str(stopped)).load_model().model_id
    pd.testing.assert_frame_equal(metrics(whole), metrics(stopped), check_exact=True)


@pytest.mark.parametrize("mining", ["random", "offending", "both"])
def test_negatives_are_windows_of_the_background_a_few_of_each_view(classifier, data, tmp_path, mining):
    plan = detector_plan(classifier, data, tmp_path, mining=mining, negatives=3)
    trainer = DetectorTrainer(plan, **PLACE)
    trainer.classes = ("a", "b", BACKGROUND)
    label = torch.tensor([[2, 2, 2, 2, 2, 0, -1], [1, 1, 2, -1, 2, 0, 0], [0, 1, 0, 1, -1, -1, 1]])
    outputs = torch.randn(3, 7, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    taken = trainer._mined(outputs, label)
    assert taken.sum(1).tolist() == [3, 2, 0]
    assert (label[taken] == 2).all()
    worst = outputs.softmax(2)[0, :5, 2].argsort()[: {"random": 0, "offending": 3, "both": 2}[mining]]
    assert taken[0, worst].all()
    torch.manual_seed(1)
    others = [trainer._mined(outputs, label)[0].tolist() for _ in range(20)]
    assert (len({tuple(other) for other in others}) > 1) == (mining != "offending")


@pytest.mark.parametrize("kind", [Localizer, Detector])
def test_failures_are_those_of_any_training(kind, classifier, data, tmp_path):
    assert options(kind, tmp_path / "run", classifier, data).places().failures == 3
    assert options(kind, tmp_path / "run", classifier, data, failures=100).places().failures == 100
    with pytest.raises(RunError, match="--failures is -1: give 0, for none, or more"):
        train(kind, tmp_path / "run", classifier, data, failures=-1)
    assert not (tmp_path / "run").exists()


def localizer(classifier, data, tmp_path, **more):
    given = options(Localizer, tmp_path / "plan", classifier, data, **more)
    architecture = "overfeat_fast_small" + ("+class-boxes" if given.boxes == "per-class" else "+boxes")
    model = Run.at(str(classifier)).load_model()
    known = train_boxes._plan(given, model, architecture, train_boxes._recipe(given))
    own = {name: getattr(given, name) for name in ("in_view", "filled", "learns")}
    return train_boxes.LocalizerTrainer(train_boxes.LocalizerPlan(**known, **own), **PLACE)


@pytest.mark.parametrize("learns", ["regressor", "all"])
def test_the_loss_is_that_of_the_windows_that_show_a_box(classifier, data, tmp_path, learns):
    trainer = localizer(classifier, data, tmp_path, boxes="per-class", learns=learns)
    trainer.classes = ("a", "b")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 2, generator=generator)
    boxes, edges = (torch.rand(2, 3, count, generator=generator) for count in (2 * 4, 4))
    label = torch.tensor([[0, -1, 1], [1, 1, -1]])
    batch = Windows(*(torch.empty(0),) * 1, label, edges, torch.empty(0), torch.empty(0), [])
    losses, right = trainer._losses(torch.cat([scores, boxes], 2) if learns == "all" else boxes, batch)
    expected = []
    for n, w in (label >= 0).nonzero().tolist():
        said, wanted = boxes[n, w].view(2, 4)[label[n, w]], edges[n, w]
        distance = ((said - wanted) ** 2).sum()
        named = -scores[n, w].log_softmax(0)[label[n, w]]
        expected.append(25 * distance + named if learns == "all" else distance)
    torch.testing.assert_close(losses, torch.stack(expected))
    assert right.shape == (4,)


def test_all_of_the_network_learns_where_it_is_asked_to(classifier, data, tmp_path):
    run = tmp_path / "all"
    assert train(Localizer, run, classifier, data, learns="all", stretch=1.5) == 0
    before, after = tensors(classifier), tensors(run)
    assert not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    found = metrics(run)
    assert found.train_loss.iloc[1] < found.train_loss.iloc[0]
    with pytest.raises(RunError, match=r"holds another training .*learns: 'all' there, asked 'regressor'"):
        train(Localizer, run, classifier, data, stretch=1.5)
    detector = tmp_path / "detector"
    assert train(Detector, detector, classifier, data, epochs=1) == 0
    with pytest.raises(RunError, match="would forget what the class 'background' looks like"):
        train(Localizer, tmp_path / "refused", detector, data, learns="all")
    assert not (tmp_path / "refused").exists()


def test_overlaps_in_training_are_those_of_the_tables():
    corners = np.random.default_rng(0).uniform(0, 1, (50, 2))
    boxes = [np.concatenate([corners + d, corners + d + 0.5], 1) for d in (0, 0.2)]
    np.testing.assert_allclose(_iou(*map(torch.from_numpy, boxes)), iou(*boxes))


def test_what_cannot_be_used_is_listed_and_the_rest_trains(classifier, tmp_path):
    """A box without an area is left out; an image without any box, or that is no image, is skipped."""
    samples = drawn("train", range(16))
    flat = json.loads(samples[1][1]["json"])
    flat["boxes"] = [{"label": CLASSES[0], "xyxy": [5, 5, 5, 30]}, *flat["boxes"]]
    samples[1][1]["json"] = json.dumps(flat).encode()
    samples[2][1]["json"] = json.dumps({"boxes": [{"label": "zebra", "xyxy": [0, 0, 9, 9]}]}).encode()
    samples[3][1]["jpg"] = b"no image"
    data, run = write(tmp_path / "data", train=samples, val=drawn("val", range(4))), tmp_path / "run"
    assert train(Localizer, run, classifier, data) == 3
    skipped = pd.read_parquet(run / "results" / "skipped" / "train.parquet")
    found = set(zip(skipped.key, skipped.reason, strict=True))
    assert found == {
        ("train-000001", "box_no_area"),
        ("train-000002", "no_box"),
        ("train-000003", "bad_image"),
    }
    detector = tmp_path / "detector"
    assert train(Detector, detector, classifier, data, max_skipped=0.5) == 0
    reasons = pd.read_parquet(detector / "results" / "skipped" / "train.parquet").reason
    assert set(reasons) == {"box_no_area", "box_unknown_class", "bad_image"}  # without a box it is background


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (Localizer, {"scales": (3, 1)}, "--scales is"),
        (Detector, {"scales": ()}, "--scales is"),
        (Localizer, {"scales": (7,)}, r"--scales is \(7,\): give some of 1 to 6, ascending"),
        (Localizer, {"batch": 500}, "--batch is 500, and the split 'train' holds 24 images"),
        (Localizer, {"in_view": 1.5}, "--in-view is 1.5"),
        (Localizer, {"filled": -0.1}, "--filled is -0.1"),
        (Localizer, {"stretch": 0.5}, "--stretch is 0.5: give 1, for none, to 4"),
        (Localizer, {"seed": -1}, "--seed is -1"),
        (Localizer, {"lr": 0.0}, "lr is 0.0; expected more than 0"),
        (Detector, {"negatives": 0}, "--negatives is 0"),
    ],
)
def test_what_is_refused_before_anything_is_written(classifier, data, tmp_path, kind, more, message):
    with pytest.raises(RunError, match=message):
        train(kind, tmp_path / "run", classifier, data, **more)
    assert not (tmp_path / "run").exists()


def test_networks_and_data_that_do_not_go_together_are_refused(classifier, data, tmp_path):
    other = save_network(tmp_path / "zfnet", "zfnet_small")
    with pytest.raises(RunError, match="zfnet_small looks at one window of an image: only OverFeat's"):
        train(Localizer, tmp_path / "run", other, data)
    with pytest.raises(RunError, match="zfnet_small takes images of one size"):
        train(Detector, tmp_path / "run", other, data)
    detector = save_network(tmp_path / "detector", classes=(*CLASSES, BACKGROUND))
    with pytest.raises(RunError, match="give --from a classifier that jobs/train.py made"):
        train(Detector, tmp_path / "run", detector, data)
    strangers = save_network(tmp_path / "strangers", classes=("cat", "dog"))
    with pytest.raises(RunError, match=r"has a box of a class of overfeat_fast_small \({'unknown_class'"):
        train(Localizer, tmp_path / "run", strangers, data)


def test_a_dead_source_is_refused(tmp_path, data):
    with pytest.raises(RunError, match="there is no trained model in"):
        train(Localizer, tmp_path / "run", tmp_path / "nothing", data)


@pytest.mark.slow
def test_ray_train_gives_what_one_process_gives(classifier, data, tmp_path, ray_cluster):
    alone, ray = tmp_path / "alone", tmp_path / "ray"
    train(Detector, alone, classifier, data)
    train(Detector, ray, classifier, data, workers=Workers(num=1, cpus=1))
    assert Run.at(str(alone)).load_model().model_id == Run.at(str(ray)).load_model().model_id
    pair = tmp_path / "pair"
    train(Localizer, tmp_path / "one", classifier, data)
    train(Localizer, pair, classifier, data, workers=Workers(num=2, cpus=1))
    one, two = (tensors(run)["regressor.hidden2.weight"] for run in (tmp_path / "one", pair))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_the_atlas_of_such_a_run_shows_what_it_has(classifier, data, tmp_path):
    from pipeline import atlas, sweep
    from pipeline.analyses import top9
    from pipeline.context import Options

    run = tmp_path / "boxes"
    train(Localizer, run, classifier, data, epochs=1)
    options_ = Options(run=str(run), data=str(data), workers=Workers(num=0))
    sweep.run(top9.ANALYSIS, options_, top9.Config(layers=("conv5",)))
    page = atlas.build(Run.at(str(run)), atlas.Options())
    assert b"overfeat_fast_small+boxes" in page.read()
