"""The transfer table against scikit-learn on the same images, where the answer is known, and without duplicates."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from pipeline import derive
from pipeline.analyses import transfer, transfer_duplicates, vectors
from pipeline.indexing import index_shards
from pipeline.runs import RunError
from tests.conftest import CLASSES
from tests.pipeline.exact import assert_same
from tests.pipeline.test_features import run_features
from tests.tars import write_tar

LAYERS = ("conv2", "fc6")


def run_transfer(run, name=None, **config):
    config = {"images_per_class": (2, 5), "folds": 3, **config}
    assert derive.run(transfer.ANALYSIS, derive.Options(run=str(run), name=name), transfer.Config(**config)) == 0
    return pd.read_parquet(run / "results" / ("transfer" if name is None else f"transfer-{name}"))


def run_duplicates(run, **config):
    config = transfer_duplicates.Config(**config)
    assert derive.run(transfer_duplicates.ANALYSIS, derive.Options(run=str(run)), config) == 0
    return pd.read_parquet(run / "results" / "transfer_duplicates")


def coloured(rng, label, noise):
    """A picture whose mean colour says its class, under noise."""
    pixels = 90 + 60 * np.eye(3)[label] + rng.normal(0, noise, (8, 8, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((72, 72), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder, splits, classes=CLASSES):
    """Shards of pictures: split -> [(key, png, label or None)]."""
    folder.mkdir()
    for split, pictures in splits.items():
        members = [
            (key, {"png": png} | ({} if label is None else {"cls": str(label).encode()}))
            for key, png, label in pictures
        ]
        write_tar(folder / f"{split}-0.tar", members)
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    index_shards([str(p) for p in folder.glob("*.tar")], str(folder), classes=None, accept_damaged=False)
    return folder


@pytest.fixture
def described(make_run, tmp_path):
    """A run with the features of 3 classes of 8, 9 and 10 pictures in two splits, told apart by colour with errors."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [8, 9, 10]))
    pictures = [(f"p{i:02d}", coloured(rng, label, 150), label) for i, label in enumerate(labels)]
    pictures.append(("unlabelled", coloured(rng, 0, 150), None))
    data, run = write(tmp_path / "data", {"train": pictures[::2], "val": pictures[1::2]}), make_run()
    for split in ("train", "val"):
        run_features(run, data, split=split, layers=LAYERS)
    return run


def by_definition(run, layer, classifier, per_class, most, folds):
    """Mean per-class accuracy of each fold, by scikit-learn's own scaling; the draw as it is documented."""
    frame = pd.read_parquet(run / "results" / "features").query("layer == @layer").dropna(subset="label")
    frame = frame.sort_values(["split", "key"])
    x, y = np.stack(frame.features.to_list()).astype(np.float64), frame.label.to_numpy().astype(int)
    found = []
    for fold in range(folds):
        rng, train, test = np.random.default_rng([0, fold]), [], []
        for label in range(3):
            order = rng.permutation(np.flatnonzero(y == label))
            train += order[:per_class].tolist()
            test += order[most:].tolist()
        scale = StandardScaler().fit(x[train])
        given, asked = (scale.transform(x[some]) / np.sqrt(x.shape[1]) for some in (train, test))
        fit = LogisticRegression(C=10, tol=1e-6, max_iter=5000) if classifier == "softmax" else LinearSVC(C=1, tol=1e-6)
        found.append(balanced_accuracy_score(y[test], fit.fit(given, y[train]).predict(asked)))
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_accuracies_are_scikit_learns_on_the_same_images(described, layer):
    frame = run_transfer(described).query("layer == @layer")
    assert frame.images_per_class.tolist() == [2, 2, 5, 5]
    assert frame.classifier.tolist() == ["softmax", "svm"] * 2
    for row in frame.itertuples():
        expected = by_definition(described, layer, row.classifier, row.images_per_class, most=5, folds=3)
        assert row.fold_accuracy.tolist() == pytest.approx(expected, abs=1e-12)
        assert row.accuracy == pytest.approx(np.mean(expected))
        assert row.spread == pytest.approx(np.std(expected, ddof=1))
        assert row.class_labels.tolist() == [0, 1, 2]
        assert row.class_accuracy.mean() == pytest.approx(row.accuracy)
    assert (frame.test_images == 27 - 3 * 5).all()
    assert frame.converged.all()
    assert frame.c.tolist() == [10.0, 1.0] * 2
    assert (frame["values"] == {"conv2": 64, "fc6": 512}[layer]).all()
    assert (frame.accuracy > 0.33).all()
    assert frame.accuracy.min() < 1


def test_what_is_separable_is_right_and_shuffled_labels_are_chance(make_run, tmp_path):
    rng = np.random.default_rng(1)
    true = np.repeat([0, 1, 2], 30)
    for name, labels in (("true", true), ("shuffled", rng.permutation(true))):
        pictures = [
            (f"p{i:03d}", coloured(rng, t, 5), label) for i, (t, label) in enumerate(zip(true, labels, strict=True))
        ]
        run = make_run(f"run-{name}")
        run_features(run, write(tmp_path / name, {"val": pictures}), layers=("conv5",))
        accuracy = run_transfer(run, images_per_class=(8,), folds=5).accuracy
        assert (accuracy == 1.0).all() if name == "true" else (abs(accuracy - 1 / 3) < 0.1).all()


def test_a_test_class_has_at_most_so_many_and_one_fold_has_no_spread(described):
    frame = run_transfer(described, test_images=2, folds=1, classifiers=("svm",), splits=("train", "val"))
    assert (frame.test_images == 6).all()
    assert frame.spread.isna().all()


def test_images_of_the_other_set_are_found_and_left_out(described, make_run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    frame = pd.read_parquet(described / "results" / "features").query("layer == 'conv2'").sort_values("key")
    labels = rng.permutation(np.repeat([0, 1, 2], [8, 9, 10]))
    again = [(f"other-{i}", coloured(rng, label, 150), None) for i, label in enumerate(labels)]
    fresh = [(f"fresh-{i}", coloured(np.random.default_rng(9 + i), i % 3, 150), None) for i in range(9)]
    data = write(tmp_path / "other", {"train": [*fresh, *again[:4]]})
    run_features(described, data, split="train", layers=("conv2",), name="other")
    found = run_duplicates(described, layers=("conv2",), against="features-other", correlation=0.999999)
    assert sorted(found[["key", "other_key"]].to_numpy().tolist()) == [[f"p{i:02d}", f"other-{i}"] for i in range(4)]
    assert "conv2: 4 of 28 images have a duplicate" in capsys.readouterr().out
    x = np.stack(frame.features.to_list()).astype(float)
    assert (found.correlation > np.sort(np.corrcoef(x)[np.triu_indices(28, 1)])[-1]).all()
    table = run_transfer(described, images_per_class=(2,), layers=("fc6",), duplicates="transfer_duplicates")
    assert (table.duplicates == 4).all()
    assert (table.test_images == 27 - 4 - 6).all()
    with pytest.raises(RunError, match=r"there is no table transfer_duplicates-x .+ run jobs/transfer_duplicates.py"):
        run_transfer(described, name="x", duplicates="transfer_duplicates-x")


def test_within_a_set_the_first_stays(make_run, tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    one, two = (coloured(rng, 0, 150) for _ in range(2))
    splits = {"val": [("a", one, 0), ("b", two, 0)], "train": [("z", one, 0), ("y", one, 0)]}
    run = make_run()
    data = write(tmp_path / "data", splits)
    for split in splits:
        run_features(run, data, split=split, layers=("conv2",), part_size=10, batch_size=2)
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 300)
    found = run_duplicates(run, layers=("conv2",), correlation=0.9999999)
    pairs = found[["split", "key", "other_split", "other_key"]].to_numpy().tolist()
    assert pairs == [["train", "z", "train", "y"], ["val", "a", "train", "y"]]


def test_correlations_are_numpys():
    rng = np.random.default_rng(0)
    x = rng.normal(50, 3, (12, 40)).astype(np.float32)
    x[3] = 5
    found = transfer_duplicates.normalised(x) @ transfer_duplicates.normalised(x).T
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(np.corrcoef(x.astype(float)))
    assert np.abs(found - expected).max() < 1e-12


def test_shards_and_blocks_change_nothing(make_run, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [(f"p{i:02d}", coloured(rng, i % 3, 150), i % 3) for i in range(24)]
    runs = []
    for name, order in (("one", pictures), ("two", pictures[::-1])):
        runs.append(make_run(name))
        run_features(runs[-1], write(tmp_path / f"data-{name}", {"val": order}), layers=("fc6",), batch_size=1)
        run_transfer(runs[-1])
        monkeypatch.setattr(vectors, "BLOCK_BYTES", 10_000)
    one, two = (pd.read_parquet(run / "results" / "transfer").drop(columns="data_id") for run in runs)
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_a_class_with_too_few_images_is_named(described):
    with pytest.raises(RunError, match="--images-per-class 8: class 0 has 8 images: train on 7 at most"):
        run_transfer(described, images_per_class=(3, 8))


def test_the_same_command_gives_the_same_bits(described, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(described, other)
    run_transfer(described)
    run_transfer(other)
    assert_same(described, other, "transfer")
    with pytest.raises(RunError, match=r"svm_c: finished with 1.0, asked 2.0.+--name"):
        run_transfer(described, svm_c=2.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"folds": 0}, "--folds is 0"),
        ({"test_images": 0}, "--test-images is 0"),
        ({"softmax_c": -1.0}, "--softmax-c is -1"),
        ({"svm_c": 0.0}, "--svm-c is 0"),
        ({"images_per_class": ()}, "--images-per-class is"),
        ({"classifiers": ()}, "no --classifiers"),
    ],
)
def test_what_transfer_cannot_be_is_refused(config, words):
    with pytest.raises(RunError, match=words):
        transfer.Config(**config)
    with pytest.raises(RunError, match="--correlation is 2"):
        transfer_duplicates.Config(layers=("conv5",), correlation=2)
