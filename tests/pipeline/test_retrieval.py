"""The retrieval table: against all distances sorted in Python; a copy of an image is at distance 0."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline import derive
from pipeline.analyses import retrieval, vectors
from pipeline.indexing import index_shards
from pipeline.runs import RunError
from tests.conftest import CLASSES, samples
from tests.pipeline.exact import assert_same
from tests.pipeline.test_features import run_features
from tests.tars import write_tar

LAYERS = ("conv5", "fc6")


def run_retrieval(run, name=None, **config):
    return derive.run(retrieval.ANALYSIS, derive.Options(run=str(run), name=name), retrieval.Config(**config))


@pytest.fixture
def described(make_run, make_shards):
    """A run with the features of two splits."""
    data, run = make_shards(train=[9, 8], val=[7]), make_run()
    for split in ("train", "val"):
        run_features(run, data, split=split, layers=LAYERS)
    return run


def by_definition(run, layer, queries, gallery, k):
    """(split, key, rank, distance, neighbour's split and key, same class), all pairs sorted."""
    frame = pd.read_parquet(run / "results" / "features").query("layer == @layer")
    rows = []
    for one in frame[frame.split.isin(queries)].itertuples():
        others = [
            (
                np.sqrt(((one.features.astype(float) - two.features.astype(float)) ** 2).sum()),
                two.split,
                two.key,
                two.label,
            )
            for two in frame[frame.split.isin(gallery)].itertuples()
            if (one.split, one.key) != (two.split, two.key)
        ]
        for rank, (distance, split, key, label) in enumerate(sorted(others)[:k], start=1):
            rows.append((one.split, one.key, rank, distance, split, key, label == one.label))
    return rows


@pytest.mark.parametrize(("queries", "gallery"), [((), ()), (("val",), ("train",)), (("train",), ("train", "val"))])
@pytest.mark.parametrize("k", [1, 6, 100])
def test_neighbours_are_all_distances_sorted(described, queries, gallery, k, monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 1500)
    run_retrieval(described, queries=queries, gallery=gallery, k=k)
    both = ("train", "val")
    for layer in LAYERS:
        found = pq.read_table(described / "results" / "retrieval" / f"{layer}.parquet").to_pandas()
        names = ["split", "key", "rank", "distance", "neighbour_split", "neighbour_key", "same_class"]
        rows = list(found[names].itertuples(index=False, name=None))
        assert rows == by_definition(described, layer, queries or both, gallery or both, k)
        assert (found.same_class == (found.label == found.neighbour_label)).all()
        assert (found.neighbour_label_name == found.neighbour_label.map(dict(enumerate(CLASSES)))).all()


def test_a_copy_is_at_distance_0_and_first(make_run, tmp_path, capsys):
    data, run = tmp_path / "data", make_run()
    data.mkdir()
    pictures = samples(9)
    copies = [(f"copy-{key}", {"jpg": members["jpg"]}) for key, members in pictures[:4]]  # without a class
    write_tar(data / "val-0.tar", [*pictures, *copies])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run_features(run, data, layers=LAYERS, part_size=100, batch_size=13)
    run_retrieval(run, k=3)
    frame = pd.read_parquet(run / "results" / "retrieval").set_index(["layer", "key", "rank"])
    for layer in LAYERS:
        for key, _ in copies:
            for one, other in ((key, key[5:]), (key[5:], key)):
                first = frame.loc[layer, one, 1]
                assert (first.distance, first.neighbour_key) == (0.0, other)
                assert first.same_class is None
        assert (frame.loc[layer, "s0-0008", 1].distance) > 0
    share = frame.loc["fc6"].same_class.dropna().mean()
    assert f"retrieval: fc6: of the 3 nearest {share:.1%} are of the same class" in capsys.readouterr().out


def test_the_size_of_blocks_changes_nothing(described, make_run, tmp_path, monkeypatch):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(described, other)
    run_retrieval(described)
    monkeypatch.setattr(vectors, "BLOCK_BYTES", 3000)
    run_retrieval(other)
    assert_same(described, other, "retrieval")


def test_what_is_missing_is_named(described, make_run):
    with pytest.raises(RunError, match=r"there is no conv1 of any split in features of .+ run jobs/features.py"):
        run_retrieval(described, layers=("conv1",))
    with pytest.raises(RunError, match="there is no conv5, fc6 of test in features of .+conv5 of train, val; fc6"):
        run_retrieval(described, queries=("test",))
    with pytest.raises(RunError, match="there is no layer of any split in features of .+which has nothing"):
        run_retrieval(make_run("empty"))
    with pytest.raises(RunError, match="--k is 0"):
        retrieval.Config(k=0)


def test_a_finished_slice_of_retrieval_is_never_rewritten(described):
    run_retrieval(described, layers=("fc6",))
    path = described / "results" / "retrieval" / "fc6.parquet"
    before = path.stat().st_mtime_ns
    run_retrieval(described)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(RunError, match=r"k: finished with 6, asked 2.+--name"):
        run_retrieval(described, k=2)
