"""The multilabel table: PASCAL's protocol by its definition, on images of several classes."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from pipeline import derive
from pipeline.analyses import multilabel
from pipeline.indexing import index_shards
from pipeline.runs import RunError
from tests.conftest import CLASSES, samples
from tests.pipeline.test_features import run_features
from tests.tars import write_tar
from zfnet.transfer import average_precision


def run_multilabel(run, **config):
    config = multilabel.Config(layers=("conv2",), **config)
    assert derive.run(multilabel.ANALYSIS, derive.Options(run=str(run)), config) == 0
    return pd.read_parquet(run / "results" / "multilabel")


@pytest.fixture
def boxed(make_run, tmp_path):
    """Features of two splits: images with boxes of one to three classes, with a class alone, and with none."""
    rng = np.random.default_rng(0)
    names = ("zebra", "ant", "cow")
    data, run = tmp_path / "data", make_run()
    data.mkdir()
    for seed, (split, count) in enumerate((("train", 14), ("val", 11))):
        pictures = samples(count, seed=seed)
        for _, members in pictures[2:]:
            labels = rng.choice(names, size=rng.integers(1, 4))
            members["json"] = json.dumps({"boxes": [{"label": str(label)} for label in labels]}).encode()
        del pictures[0][1]["cls"]
        write_tar(data / f"{split}-0.tar", pictures)
    (data / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(p) for p in data.glob("*.tar")], str(data), classes=None, accept_damaged=False)
    for split in ("train", "val"):
        run_features(run, data, split=split, layers=("conv2",))
    return run


def precision_by_definition(scores, positive):
    """PASCAL's evaluation code: cut after every score, then the area under the envelope."""
    points = []
    for threshold in sorted(set(scores)):
        found = scores >= threshold
        points.append((positive[found].sum() / positive.sum(), positive[found].mean()))
    points.sort()
    area, before = 0.0, 0.0
    for i, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[i:])
        before = recall
    return area


@pytest.mark.parametrize("decimals", [1, 8])
def test_average_precision_is_pascals(decimals):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.uniform(size=30).round(decimals), rng.uniform(size=30) < 0.3
        found = average_precision(scores, positive)
        assert found == pytest.approx(precision_by_definition(scores, positive), abs=1e-12)
        assert found >= average_precision_score(positive, scores) - 1e-12  # the area without the envelope
    assert average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, True, False])) == 1.0
    assert average_precision(np.array([3.0, 2.0, 1.0]), np.array([False, False, True])) == pytest.approx(1 / 3)
    assert np.isnan(average_precision(np.ones(3), np.zeros(3, dtype=bool)))


def test_the_table_is_scikit_learns_softmax_and_pascals_precision(boxed, capsys):
    found = run_multilabel(boxed)
    frame = pd.read_parquet(boxed / "results" / "features").sort_values(["split", "key"])
    frame["names"] = [
        list(boxes) if boxes is not None else [] if own is None or pd.isna(own) else [own]
        for boxes, own in zip(frame.box_labels, frame.label_name, strict=True)
    ]
    frame = frame[frame.names.map(len) > 0]
    train, test = (frame[frame.split == split] for split in ("train", "val"))
    classes = sorted({name for names in train.names for name in names})
    scale = StandardScaler().fit(np.stack(train.features.to_list()).astype(float))
    x, asked = (scale.transform(np.stack(part.features.to_list()).astype(float)) / 8 for part in (train, test))
    rows = [(i, name) for i, names in enumerate(train.names) for name in names]
    fit = LogisticRegression(C=10, tol=1e-8, max_iter=5000).fit(x[[i for i, _ in rows]], [name for _, name in rows])
    scores = fit.predict_proba(asked)
    assert found.label_name.tolist() == classes == fit.classes_.tolist()
    assert {"ant", "cow", "zebra"} < set(classes)  # and the class of the image without boxes
    for place, row in enumerate(found.itertuples()):
        positive = np.array([row.label_name in names for names in test.names])
        assert (row.train_images, row.test_images, row.test_positives) == (13, 10, positive.sum())
        assert row.train_positives == sum(row.label_name in names for names in train.names)
        if positive.any():
            expected = precision_by_definition(scores[:, place], positive)
            assert row.average_precision == pytest.approx(expected, abs=1e-9)
        else:
            assert np.isnan(row.average_precision)
    assert f"mean average precision {found.average_precision.mean():.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("config", [{"train": ()}, {"test": ("train",)}])
def test_splits_must_differ(config):
    with pytest.raises(RunError, match="give each a split that the other has not"):
        multilabel.Config(**config)
    with pytest.raises(RunError, match="--softmax-c is 0"):
        multilabel.Config(softmax_c=0)
