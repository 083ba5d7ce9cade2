"""Networks trained from scratch: transfer's own draws, ordinary trainings, and accuracies of their own answers."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score

from pipeline import sweep, train
from pipeline.analyses import scratch
from pipeline.cluster import Workers
from pipeline.indexing import write_choice
from pipeline.runs import Run, RunError
from pipeline.shards import BadShards, Index
from pipeline.storage import Location
from tests.pipeline.test_transfer_table import coloured, write

GIVEN = {"epochs": 2, "batch": 4, "decoders": 0, "workers": Workers(num=0)}
NETWORK = "zfnet_small_no3467"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3 classes of 6, 7 and 8 pictures in two splits, told apart by colour, and one without a class."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [6, 7, 8]))
    pictures = [(f"p{i:02d}", coloured(rng, label, 20), label) for i, label in enumerate(labels)]
    pictures.append(("unlabelled", coloured(rng, 0, 20), None))
    return write(tmp_path_factory.mktemp("scratch") / "data", {"train": pictures[::2], "val": pictures[1::2]})


def options(run, data, **more):
    given = {"images_per_class": (2, 4), "folds": 2, "test_images": 3, "architecture": NETWORK, **GIVEN, **more}
    return scratch.Options(run=str(run), data=str(data), **given)


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("made") / "run"
    assert scratch.run(options(run, data)) == 0
    return run


def chosen(place):
    frame = pd.read_parquet(place / "images" / "samples.parquet")
    return {split: sorted(some.key) for split, some in frame.groupby("split")}


def test_the_images_are_transfers_by_its_definition(made, data):
    frame = pd.read_parquet(data / "samples.parquet").dropna(subset="label").sort_values(["split", "key"])
    for fold in range(2):
        rng, order = np.random.default_rng([0, fold]), {}
        for label in range(3):
            members = np.flatnonzero(frame.label.to_numpy() == label)
            order[label] = frame.key.to_numpy()[rng.permutation(members)]
        for count in (2, 4):
            train_keys = sorted(key for keys in order.values() for key in keys[:count])
            test_keys = sorted(key for keys in order.values() for key in keys[4:7])
            assert chosen(made / "scratch" / f"{count}-{fold}") == {"train": train_keys, "val": test_keys}


def test_accuracies_are_those_of_the_networks_own_answers(made):
    rows = pd.read_parquet(made / "results" / "scratch").sort_values("images_per_class")
    assert rows.images_per_class.tolist() == [2, 4]
    for row in rows.itertuples():
        found = []
        for fold in range(2):
            run = made / "scratch" / f"{row.images_per_class}-{fold}"
            answers = pd.read_parquet(run / "results" / "predictions")
            found.append(balanced_accuracy_score(answers.label, answers.predicted_class))
            assert row.model_ids[fold] == json.loads((run / "run.json").read_text())["model_id"]
        assert row.fold_accuracy.tolist() == pytest.approx(found, abs=1e-12)
        assert row.accuracy == pytest.approx(np.mean(found))
        assert row.spread == pytest.approx(np.std(found, ddof=1))
        assert row.class_accuracy.mean() == pytest.approx(row.accuracy)
        assert (row.class_labels.tolist(), row.test_images, row.epochs) == ([0, 1, 2], 2 + 3 + 3, 2)
        assert row.architecture == NETWORK


def test_each_is_an_ordinary_training_on_those_images(made, data, tmp_path):
    images = pd.read_parquet(made / "scratch" / "2-1" / "images" / "samples.parquet")
    whole = Index.load(str(data))
    place = whole.samples.to_pandas().reset_index().set_index("key")["index"]
    picked = {split: place[some.key].to_numpy() for split, some in images.groupby("split")}
    write_choice(whole, picked, Location.of(str(tmp_path / "images")))
    given = train.Options(run=str(tmp_path / "run"), data=str(tmp_path / "images"), architecture=NETWORK, **GIVEN)
    assert train.run(given) == 0
    model_id = Run.at(str(tmp_path / "run")).describe()["model_id"]
    assert pd.read_parquet(made / "results" / "scratch").set_index("images_per_class").model_ids[2][1] == model_id


def test_what_is_finished_is_not_made_again_and_other_options_are_refused(made, data, capsys):
    results = [path for path in made.rglob("*") if path.is_file() and "images" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in results}
    assert scratch.run(options(made, data)) == 0
    assert {path: path.stat().st_mtime_ns for path in results} == before
    said = capsys.readouterr().out
    assert said.count("finished already") == 8
    assert f"scratch: {NETWORK}, 4 a class:" in said
    with pytest.raises(RunError, match="holds another training"):
        scratch.run(options(made, data, epochs=3))
    with pytest.raises(RunError, match=r"another training .*validation_data_id"):
        scratch.run(options(made, data, images_per_class=(2, 3)))  # others are tested on


def test_a_kill_between_two_trainings_costs_nothing_but_time(made, data, tmp_path, monkeypatch):
    run, evaluate = tmp_path / "run", sweep.run

    def dies(analysis, swept, config):
        if swept.run.endswith("4-0"):
            raise KeyboardInterrupt
        return evaluate(analysis, swept, config)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run", dies)
        with pytest.raises(KeyboardInterrupt):
            scratch.run(options(run, data))
    assert pd.read_parquet(run / "results" / "scratch").images_per_class.tolist() == [2]
    assert scratch.run(options(run, data)) == 0
    one, other = (pq.read_table(sorted((place / "results" / "scratch").iterdir())).to_pandas() for place in (run, made))
    assert [list(ids) for ids in one.model_ids] == [list(ids) for ids in other.model_ids]


def test_the_network_is_the_runs_own_by_default(made, data):
    place = made / "scratch" / "2-0"
    assert scratch.run(options(place, data, architecture=None, images_per_class=(2,), folds=1, epochs=1)) == 0
    rows = pd.read_parquet(place / "results" / "scratch")
    assert (rows.architecture[0], rows.spread.isna().all()) == (NETWORK, True)
    with pytest.raises(RunError, match="there is no trained model"):
        scratch.run(options(made.parent / "nothing", data, architecture=None))


def test_what_cannot_be_drawn_is_refused_before_any_training(data, tmp_path):
    with pytest.raises(RunError, match=r"--images-per-class 6: class 0 has 6 images: train on 5 at most"):
        scratch.run(options(tmp_path / "run", data, images_per_class=(2, 6)))
    with pytest.raises(BadShards, match="no split 'test'"):
        scratch.run(options(tmp_path / "run", data, validation_split="test"))
    with pytest.raises(RunError, match="--folds is 0"):
        options(tmp_path / "run", data, folds=0)
    with pytest.raises(RunError, match="--images-per-class"):
        options(tmp_path / "run", data, images_per_class=())
    assert not (tmp_path / "run").exists()


def test_a_choice_has_an_identity_of_its_own_and_reads_its_samples(data, tmp_path):
    whole = Index.load(str(data))
    rows = {"a": np.array([4, 1]), "b": np.array([0, len(whole.samples) - 1]), "c": np.array([0, 2])}
    write_choice(whole, rows, Location.of(str(tmp_path / "choice")))
    found = Index.load(str(tmp_path / "choice"))
    assert found.splits == {"a": 2, "b": 2, "c": 2}
    assert len({found.data_id(split) for split in "abc"} | {whole.data_id(split) for split in ("train", "val")}) == 5
    keys = whole.samples["key"].to_pylist()
    assert [sample.key for sample in found.read(found.split("a"))] == [keys[1], keys[4]]
    assert [sample.key for sample in found.read(found.split("b"))] == [keys[0], keys[-1]]
    assert all(sample.image for sample in found.read(found.split("b")))
    with pytest.raises(BadShards, match="occurs 2 times"):
        write_choice(whole, {"a": np.array([3, 3])}, Location.of(str(tmp_path / "twice")))
    assert not (tmp_path / "twice").exists()
