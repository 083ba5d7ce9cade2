"""Evaluations end to end: the brute force bit for bit, libraries' counts, what is skipped, refused, resumed."""

import doctest
import io
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from PIL import Image
from sklearn.metrics import confusion_matrix, recall_score
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from jobs import evaluate
from pipeline import import_model, sweep
from pipeline.analyses import evaluation
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.indexing import index_shards
from pipeline.runs import Run, RunError
from pipeline.shards import Index
from pipeline.work import Cut
from tests.conftest import ROOT, SHARED, random_model, samples
from tests.pipeline.exact import assert_same
from tests.tars import write_tar
from zfnet.images import Preprocessing

NAMES = tuple(f"kind {letter}" for letter in "abcdefgh")
TABLES = ("predictions", "confusion", "class_errors", "evaluation")
UNEQUAL = [20, 13, 9]
CUT = {"part_size": 8, "batch_size": 3}


def run_evaluation(run, data, *, others=(), num=0, name=None, max_skipped=0.01, index=None, **config):
    options = Options(
        run=str(run), data=str(data), index=index, name=name, max_skipped=max_skipped, workers=Workers(num=num, cpus=1)
    )
    others = tuple(map(str, others))
    return sweep.run(evaluation.ANALYSIS, options, evaluation.Config(**{**CUT, **config}, others=others))


def table(run, name="predictions"):
    return pd.read_parquet(run / "results" / name)


def relabelled(count, seed, labels, rng):
    return [(key, {**members, "cls": str(rng.choice(labels)).encode()}) for key, members in samples(count, seed=seed)]


@pytest.fixture
def make_data(tmp_path):
    """Shards of the given sizes whose labels are of the given numbers; returns their folder."""

    def make(sizes=UNEQUAL, labels=(0, 1, 2, 4, 5, 6, 7), names=NAMES, name="data"):
        folder, rng = tmp_path / name, np.random.default_rng(0)
        folder.mkdir()
        for shard, size in enumerate(sizes):
            write_tar(folder / f"val-{shard}.tar", relabelled(size, shard, labels, rng))
        if names is not None:
            (folder / "classes.txt").write_text("\n".join(names) + "\n")
        index_shards([str(path) for path in folder.glob("*.tar")], str(folder), classes=None, accept_damaged=False)
        return folder

    return make


@pytest.fixture
def make_other(tmp_path):
    """A run of a network of another preprocessing: other sides, order, range and a mean for each pixel."""

    def make(name="other", seed=1, classes=NAMES):
        mean = torch.rand(3, 80, 80, generator=torch.Generator().manual_seed(seed))
        preprocessing = Preprocessing(resize_px=80, crop_px=64, channels="BGR", maximum=1.0, mean=mean)
        Run.at(str(tmp_path / name)).save_model(
            random_model(len(classes), seed),
            architecture="zfnet_small",
            classes=classes,
            preprocessing=preprocessing,
            about={},
        )
        return tmp_path / name

    return make


def by_definition(runs, data, views):
    """Every image through every network in plain torch and torchvision's transforms: softmax, mean, mean, sort.

    Returns: rows (key, label_rank, loss, first five classes, their probabilities).
    """
    from torchvision.transforms import v2

    models = sorted((Run.at(str(run)).load_model() for run in runs), key=lambda model: model.model_id)
    index, rows = Index.load(str(data)), []
    for part in Cut(index.split("val"), CUT["part_size"]):
        for start in range(0, part.num_rows, CUT["batch_size"]):
            batch = list(index.read(part.slice(start, CUT["batch_size"])))
            pictures = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in batch]
            of_each_network = []
            for model in models:
                resize, crop = model.preprocessing.resize_px, model.preprocessing.crop_px
                middle, last = (resize - crop) // 2, resize - crop
                if views == "centre":
                    shown = [[v2.CenterCrop(crop)(v2.Resize(resize)(picture))] for picture in pictures]
                    corners = [(middle, middle)]
                else:
                    squares = [v2.CenterCrop(resize)(v2.Resize(resize)(picture)) for picture in pictures]
                    shown = [v2.TenCrop(crop)(square) for square in squares]
                    # The last five are crops of the reflected image, so left and right change places.
                    corners = [(0, 0), (0, last), (last, 0), (last, last), (middle, middle)]
                    corners += [(0, last), (0, 0), (last, last), (last, 0), (middle, middle)]
                of_each_view = []
                for view, (top, left) in enumerate(corners):
                    pixels = torch.from_numpy(np.stack([np.asarray(some[view]) for some in shown]))
                    mean = model.preprocessing.mean
                    if mean.shape[-1] > 1:
                        mean = mean[:, top : top + crop, left : left + crop]
                    x = pixels.permute(0, 3, 1, 2).float()
                    x = x.flip(1) if model.preprocessing.channels == "BGR" else x
                    x = x * (model.preprocessing.maximum / 255)
                    with torch.no_grad():
                        of_each_view.append(model.network(x - mean).double().softmax(1))
                of_each_network.append(torch.stack(of_each_view).mean(0))
            for sample, p in zip(batch, torch.stack(of_each_network).mean(0).tolist(), strict=True):
                order = sorted(range(len(p)), key=lambda c: (-p[c], c))
                best = [float(np.float32(p[c])) for c in order[:5]]
                rows.append((sample.key, order.index(sample.label) + 1, -np.log(p[sample.label]), order[:5], best))
    return rows


def assert_is(run, expected, name="predictions"):
    found = table(run, name)
    assert len(found) == len(expected)
    for row, (key, rank, loss, classes, probabilities) in zip(found.itertuples(), expected, strict=True):
        assert (row.key, row.label_rank) == (key, rank)
        assert row.top5_classes.tolist() == classes
        assert row.predicted_class == classes[0]
        assert row.top5_probabilities.tolist() == probabilities
        assert row.loss == pytest.approx(loss, rel=1e-12, abs=1e-14)


# ---------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_predictions_are_the_brute_force_bit_for_bit(make_run, make_data, views):
    data, run = make_data(), make_run(classes=NAMES)
    assert run_evaluation(run, data, views=views) == 0
    assert_is(run, by_definition([run], data, views))
    assert set(table(run).views) == {views}


@pytest.mark.parametrize("views", ["centre", "ten"])
def test_an_ensemble_is_the_average_made_by_hand(make_run, make_other, make_data, views):
    data, runs = make_data([7, 4]), [make_run(classes=NAMES), make_run("second", 5, NAMES), make_other()]
    run_evaluation(runs[0], data, views=views, others=runs[1:])
    assert_is(runs[0], by_definition(runs, data, views))
    ids = [Run.at(str(run)).describe()["model_id"] for run in runs]
    for row in table(runs[0]).itertuples():
        assert (row.model_id, row.with_model_ids.tolist()) == (ids[0], sorted(ids[1:]))


def test_workers_and_the_order_of_the_networks_change_no_bit(make_run, make_other, make_data, ray_cluster, tmp_path):
    data, run, others = make_data(), make_run(classes=NAMES), [make_run("second", 5, NAMES), make_other()]
    run_evaluation(run, data, views="ten", others=others)
    for actors in (1, 3):
        again = tmp_path / f"{actors}-actors"
        shutil.copytree(run, again, ignore=shutil.ignore_patterns("results"))
        others.reverse()
        assert run_evaluation(again, data, views="ten", others=others, num=actors) == 0
        assert_same(run, again, *TABLES)


def test_parts_and_shards_change_no_count(make_run, make_data):
    data, run = make_data(), make_run(classes=NAMES)
    run_evaluation(run, data)
    run_evaluation(run, data, part_size=100, name="large")
    for name in TABLES[1:]:
        pd.testing.assert_frame_equal(table(run, name), table(run, f"{name}-large"))


def tiny(num_classes: int = 8) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(3, 4, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8))


def test_networks_of_other_input_sides_are_averaged(make_run, make_data, tmp_path):
    data, run = make_data([9]), make_run(classes=NAMES)
    other = tmp_path / "tiny"
    options = {"architecture": f"{__name__}:tiny", "classes": str(data / "classes.txt"), "maximum": 1.0}
    import_model.run(import_model.Options(run=str(other), **options, resize_px=72, crop_px=40))
    run_evaluation(run, data, others=[other])
    assert_is(run, by_definition([run, other], data, "centre"))


# ---------------------------------------------------------------------------------------------------------- counted


def test_the_counts_are_those_of_the_libraries(make_run, make_data):
    data, run = make_data([60, 70]), make_run(classes=NAMES)
    run_evaluation(run, data, batch_size=16, part_size=64)
    rows = table(run)
    label, predicted = rows.label.to_numpy(copy=True), rows.predicted_class.to_numpy(copy=True)
    names = dict(enumerate(NAMES))
    assert rows.label_name.tolist() == [names[i] for i in label]
    assert rows.predicted_name.tolist() == [names[i] for i in predicted]

    confusion = table(run, "confusion")
    expected = confusion_matrix(label, predicted, labels=range(8))
    found = np.zeros((8, 8), dtype=int)
    found[confusion.label, confusion.predicted_class] = confusion.images
    assert np.array_equal(found, expected)
    assert (confusion.images > 0).all()
    assert confusion.sort_values(["label", "predicted_class"]).equals(confusion)

    errors = table(run, "class_errors")
    assert errors.label.tolist() == list(range(8))
    assert errors.images.tolist() == expected.sum(1).tolist()
    assert errors.top1_wrong.tolist() == (expected.sum(1) - expected.diagonal()).tolist()
    recall = recall_score(label, predicted, labels=range(8), average=None, zero_division=np.nan)
    np.testing.assert_allclose(1 - errors.top1_error, recall, rtol=1e-15)
    assert errors.top1_error.isna().tolist() == [number == 3 for number in range(8)]
    of_class = rows.label_rank.gt(5).groupby(rows.label).sum()
    assert errors.top5_wrong.tolist() == [of_class.get(number, 0) for number in range(8)]

    (whole,) = table(run, "evaluation").itertuples()
    assert (whole.images, whole.split) == (130, "val")
    assert whole.top1_wrong == (label != predicted).sum()
    in_top5 = [value in top for value, top in zip(label, rows.top5_classes, strict=True)]
    assert whole.top5_wrong == 130 - sum(in_top5)
    assert (whole.top1_error, whole.top5_error) == (whole.top1_wrong / 130, whole.top5_wrong / 130)
    macro = MulticlassAccuracy(num_classes=8, average="macro")(torch.from_numpy(predicted), torch.from_numpy(label))
    assert whole.mean_class_accuracy == pytest.approx(float(macro), abs=1e-6)
    assert whole.loss == pytest.approx(rows.loss.mean(), rel=1e-14)


@pytest.mark.parametrize(("name", "top1", "top5"), [("squeezenet1_1", 83, 120), ("squeezenet1_0", 91, 108)])
def test_photographs_are_told_apart_as_often_as_by_torchvisions_reference(shared_data, tmp_path, name, top1, top5):
    import torchvision
    from safetensors.torch import load_file
    from torchvision.transforms import v2

    folder, weights = shared_data("imagenet-samples"), SHARED / "weights" / f"{name}.safetensors"
    data, run = tmp_path / "data", tmp_path / "run"
    index_shards([str(folder / "val-000000.tar")], str(data), classes=None, accept_damaged=False)
    classes = str(folder / "classes.txt")
    bgr = {"channels": "BGR", "maximum": 255.0, "mean": (104.0, 117.0, 123.0), "resize_px": 256, "crop_px": 227}
    network = {"architecture": f"torchvision:{name}", "weights": str(weights), "classes": classes}
    import_model.run(import_model.Options(run=str(run), **network, **bgr))
    assert run_evaluation(run, folder, index=str(data), part_size=64, batch_size=16) == 0
    (whole,) = table(run, "evaluation").itertuples()
    assert (whole.images, whole.images - whole.top1_wrong, whole.images - whole.top5_wrong) == (137, top1, top5)

    reference = torchvision.models.get_model(name).eval()
    reference.load_state_dict({key: tensor.float() for key, tensor in load_file(weights).items()})
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(227), v2.PILToTensor(), v2.ToDtype(torch.float32)])
    accuracy = {k: MulticlassAccuracy(num_classes=1000, top_k=k, average="micro") for k in (1, 5)}
    index = Index.load(str(folder), str(data))
    for sample in index.read(index.split("val")):
        x = transform(Image.open(io.BytesIO(sample.image)).convert("RGB")).flip(0)
        with torch.no_grad():
            logits = reference(x[None] - torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1))
        for metric in accuracy.values():
            metric.update(logits, torch.tensor([sample.label]))
    assert [round(float(metric.compute()) * 137) for metric in accuracy.values()] == [top1, top5]


# ------------------------------------------------------------------------------------------------ skipped, refused


def test_images_without_a_usable_label_are_skipped_and_counted(make_run, tmp_path, capsys):
    data, run = tmp_path / "data", make_run(classes=NAMES)
    data.mkdir()
    pictures = relabelled(12, 0, (0, 6), np.random.default_rng(0))
    for number in (2, 11):  # the last is a batch by itself
        del pictures[number][1]["cls"]
    pictures[4][1]["cls"] = b"8"
    pictures[5][1]["jpg"] = pictures[5][1]["jpg"][:300]
    write_tar(data / "val-0.tar", pictures)
    (data / "classes.txt").write_text("\n".join(NAMES) + "\n")
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    assert run_evaluation(run, data) == 3
    assert "4 of 12 samples skipped (2 no_label, 1 label_out_of_range, 1 bad_image)" in capsys.readouterr().out
    skipped = table(run, "skipped")
    assert dict(zip(skipped.key, skipped.reason, strict=True)) == {
        pictures[2][0]: "no_label",
        pictures[11][0]: "no_label",
        pictures[4][0]: "label_out_of_range",
        pictures[5][0]: "bad_image",
    }
    assert table(run).key.tolist() == [key for i, (key, _) in enumerate(pictures) if i not in (2, 4, 5, 11)]
    assert table(run, "evaluation").images.tolist() == [8]
    entry = json.loads((run / "results" / "manifests" / "predictions" / "images.json").read_text())
    assert (entry["samples"], entry["rows"]) == (12, 8)
    assert run_evaluation(run, data, max_skipped=0.4) == 0


def test_a_split_without_any_label_is_refused(make_run, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "val-0.tar", [(key, {"jpg": members["jpg"]}) for key, members in samples(4)])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    with pytest.raises(RunError, match=r"no image of the split 'val' has a label below 0: .+ KEY.cls"):
        run_evaluation(make_run(), data)


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("a", "b", "c", "d", "e"), r"the index of .+ has 8 classes and the network of --run 5: .+ other shards"),
        ((*NAMES[:3], "x", *NAMES[4:]), r"class 3 is 'kind d' there and 'x' in the network: .+ --classes"),
        (NAMES[::-1], "class 0 is 'kind a' there and 'kind h' in the network"),
    ],
)
def test_shards_of_other_classes_are_refused(make_run, make_data, classes, words):
    with pytest.raises(RunError, match=words):
        run_evaluation(make_run(classes=classes), make_data([3]))


def test_classes_without_names_are_named_by_the_other_side(make_run, make_data, tmp_path):
    numbers = tuple("01234567")
    named, unnamed = make_data([9], labels=(0, 6)), make_data([9], labels=(0, 6), names=None, name="unnamed")
    for run, data in ((make_run("a", 0, NAMES), unnamed), (make_run("b", 0, numbers), named)):
        assert run_evaluation(run, data) == 0
        assert set(table(run).label_name) == {"kind a", "kind g"}
        assert table(run, "class_errors").label_name.tolist() == list(NAMES)
    with pytest.raises(RunError, match="has 7 classes and the network of --run 3"):
        run_evaluation(make_run("c"), unnamed)


def test_networks_that_cannot_be_averaged_are_refused(make_run, make_other, make_data, tmp_path):
    data, run = make_data([3]), make_run(classes=NAMES)
    with pytest.raises(RunError, match=r"--with .+other has 3 classes and the network of --run 8: give runs"):
        run_evaluation(run, data, others=[make_other(classes=("x", "y", "z"))])
    with pytest.raises(RunError, match=r"--with .+wrong has other classes .+ class 0 is 'kind h' there"):
        run_evaluation(run, data, others=[make_other("wrong", classes=NAMES[::-1])])
    with pytest.raises(RunError, match="one of them twice"):
        run_evaluation(run, data, others=[make_run("copy", classes=NAMES)])
    with pytest.raises(RunError, match=r"there is no trained model in .+nowhere"):
        run_evaluation(run, data, others=[tmp_path / "nowhere"])
    body = tmp_path / "body"
    import_model.run(import_model.Options(run=str(body), architecture="torchvision:alexnet.features"))
    with pytest.raises(RunError, match="only a classifier can be evaluated"):
        run_evaluation(body, data)


def test_scores_that_are_not_finite_fail_the_part_and_name_the_key(make_run, make_data):
    data, run = make_data([4]), make_run(classes=NAMES)
    model = Run.at(str(run)).load_model()
    next(reversed(list(model.network.parameters()))).data[2] = float("inf")
    Run.at(str(run)).save_model(
        model.network, architecture="zfnet_small", classes=NAMES, preprocessing=model.preprocessing, about={}
    )
    with pytest.raises(SweepFailed, match=r"sample 's0-0000': feature map 2 .+ is NaN or infinite"):
        run_evaluation(run, data)


@pytest.mark.parametrize("field", ["part_size", "batch_size"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(RunError, match=f"--{field.replace('_', '-')} is 0"):
        evaluation.Config(**{field: 0})


# ------------------------------------------------------------------------------------------------------------ resumed


def test_an_interrupted_evaluation_goes_on_where_it_stopped(make_run, make_other, make_data, tmp_path, monkeypatch):
    data, run, other = make_data(), make_run(classes=NAMES), make_other()
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(run, undisturbed)
    run_evaluation(undisturbed, data, others=[other])
    reduced = itertools.count()

    def breaks(context, results):
        if next(reduced) >= 3:  # two parts are under way at once
            raise RunError("the power went")
        return evaluation.reduce_part(context, results)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "ANALYSIS", replace(evaluation.ANALYSIS, reduce_part=breaks))
        with pytest.raises(SweepFailed, match=r"(?s)the power went.+[45] of 7 parts are not done"):
            run_evaluation(run, data, others=[other])
    assert not (run / "results").exists()
    done = [int(path.stem[5:]) for path in (run / "unfinished" / "predictions").glob("*/parts/*")]
    assert run_evaluation(run, data, others=[other]) == 0
    assert_same(run, undisturbed, *TABLES)
    account = table(run, "account").set_index("part")
    assert len(done) == 3
    assert (account.attempts[done] == 1).all()
    assert account.attempts.max() == 2
    assert not (run / "unfinished" / "predictions").exists()


def test_a_finished_evaluation_is_never_rewritten(make_run, make_other, make_data, capsys, tmp_path):
    data, run, other = make_data([5]), make_run(classes=NAMES), make_other()
    run_evaluation(run, data)
    before = (run / "results" / "predictions" / "images.parquet").stat().st_mtime_ns
    assert run_evaluation(run, data) == 0
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"views: finished with 'centre', asked 'ten'.+--name"):
        run_evaluation(run, data, views="ten")
    with pytest.raises(RunError, match=r"sources: finished with None, asked \{'with': \['"):
        run_evaluation(run, data, others=[other])
    assert run_evaluation(run, data, others=[other], name="two") == 0
    assert (run / "results" / "predictions" / "images.parquet").stat().st_mtime_ns == before
    moved = tmp_path / "moved"
    shutil.move(other, moved)
    assert run_evaluation(run, data, others=[moved], name="two") == 0


def test_the_docs_name_every_column_and_their_query_runs(make_run, make_data, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for schema in (evaluation.PREDICTIONS, evaluation.CONFUSION, evaluation.CLASS_ERRORS, evaluation.EVALUATION):
        assert [name for name in schema.names if f"`{name}`" not in text] == []
    (tmp_path / "runs").mkdir()
    run_evaluation(make_run("runs/squeezenet", classes=NAMES), make_data([9]))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    examples = doctest.DocTestParser().get_examples(text.replace("\n```\n", "\n\n"))
    assert len(examples) >= 3
    for example in examples:
        exec(compile(example.source, "evaluation.md", "single"), names)


def test_the_job_prints_the_errors(make_run, make_other, make_data, capsys):
    data, run, other = make_data([9]), make_run(classes=NAMES), make_other()
    arguments = ["--run", str(run), "--data", str(data), "--views", "ten", "--with", str(other), "--name", "two"]
    for _ in range(2):
        assert tyro.cli(evaluate.main, args=[*arguments, "--workers.num", "0"]) == 0
        (whole,) = table(run, "evaluation-two").itertuples()
        assert (
            f"evaluation-two: 9 images, views ten, average of 2 networks: top-1 error {whole.top1_wrong / 9:.2%} "
            f"({whole.top1_wrong} wrong), top-5 error {whole.top5_wrong / 9:.2%} ({whole.top5_wrong} wrong), mean "
            f"per-class accuracy {whole.mean_class_accuracy:.2%}, loss {whole.loss:.4f}"
        ) in capsys.readouterr().out
