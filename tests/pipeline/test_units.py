"""The table units on a small run: against counts written out, a network with known faults, and two runs compared."""

import math
from collections import Counter

import pandas as pd
import pytest
import torch

from pipeline import derive, sweep
from pipeline.analyses import duplicates, top9, units, units_comparison
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import Run, RunError
from tests.conftest import CLASSES, random_model
from zfnet import filters
from zfnet.images import Preprocessing

LAYERS = ("conv1", "conv2", "conv5")


def sweep_of(run, data, name=None):
    options = Options(run=str(run), data=str(data), name=name, workers=Workers(num=0, cpus=2))
    assert sweep.run(top9.ANALYSIS, options, top9.Config(layers=LAYERS)) == 0
    tables = {"maxima": "maxima" if name is None else f"maxima-{name}"}
    assert derive.run(duplicates.ANALYSIS, derive.Options(run=str(run), name=name), duplicates.Config(**tables)) == 0


def units_of(run, **config):
    assert derive.run(units.ANALYSIS, derive.Options(run=str(run)), units.Config(**config)) == 0
    return pd.read_parquet(run / "results" / "units").set_index(["layer", "feature_map"]).sort_index()


def faulty_run(path):
    """A zfnet_small whose conv1 has a dead map, a pair of equal filters, one of no frequency and a large one."""
    network = random_model()
    with torch.no_grad():
        network.conv1.weight[2], network.conv1.bias[2] = 0, -1
        network.conv1.weight[5], network.conv1.bias[5] = network.conv1.weight[3], network.conv1.bias[3]
        network.conv1.weight[7] = 0.01
        network.conv1.weight[9] *= 10
    size = {"resize_px": network.resize_px, "crop_px": network.input_px}
    preprocessing = Preprocessing(**size, mean=torch.full((3, 1, 1), 120.0))
    Run.at(str(path)).save_model(
        network, architecture="zfnet_small", classes=CLASSES, preprocessing=preprocessing, about={}
    )
    return path


@pytest.fixture
def faulty(tmp_path, make_shards):
    run = faulty_run(tmp_path / "faulty")
    sweep_of(run, make_shards(val=[20]))
    return run


def test_known_faults_are_found(faulty):
    found = units_of(faulty).loc["conv1"]
    assert found.dead[found.dead].index.tolist() == [2]
    assert not found.nearly_dead.any()
    assert found.filter_duplicate[found.filter_duplicate].index.tolist() == [3, 5]
    assert found.nearest_map[[3, 5]].tolist() == [5, 3]
    assert (found.response_duplicates[[3, 5]] >= 1).all()
    assert found.dominant[9]
    assert pd.isna(found.nearest_cosine[2])
    assert pd.isna(found.class_entropy[2])
    assert found.low_share[7] == found.low_share.max()


def naive_entropy(labels, classes):
    """Shannon's sum, over that of labels dealt out to the classes in turn."""

    def entropy(some):
        counts = Counter(some).values()
        return -sum(n / len(some) * math.log(n / len(some)) for n in counts)

    largest = entropy([i % classes for i in range(len(labels))]) if labels else 0
    return entropy(labels) / largest if largest else None


def test_every_column_against_its_definition(faulty):
    found = units_of(faulty, dominance=1.2, filter_cosine=0.3)
    network = Run.at(str(faulty)).load_model().network
    statistics = pd.read_parquet(faulty / "results" / "feature_maps").set_index(["layer", "feature_map"])
    pairs = pd.read_parquet(faulty / "results" / "duplicates")
    top = pd.read_parquet(faulty / "results" / "top9")
    for layer in LAYERS:
        weight = network.get_submodule(layer).weight.detach().double()
        rms = [math.sqrt(sum(v * v for v in w.flatten().tolist()) / w.numel()) for w in weight]
        median = float(pd.Series(rms).median())
        classes = top[top.layer == layer].label.nunique()
        for m, row in found.loc[layer].iterrows():
            assert row.active_share == statistics.active_share[layer, m]
            assert row.rms == pytest.approx(rms[m], rel=1e-12)
            assert row.dominant == (rms[m] / median > 1.2)
            if rms[m]:
                cosine = torch.nn.functional.cosine_similarity(weight.flatten(1), weight[m].flatten()[None])
                cosine[[m, *(i for i, value in enumerate(rms) if not value)]] = -2
                assert row.nearest_cosine == pytest.approx(float(cosine.max()), rel=1e-9)
                assert row.filter_duplicate == (float(cosine.max()) >= 0.3)
            mine = pairs[(pairs.layer == layer) & ((pairs.feature_map == m) | (pairs.other_map == m)) & pairs.duplicate]
            assert row.response_duplicates == len(mine)
            labels = top[(top.layer == layer) & (top.feature_map == m)].label.tolist()
            entropy = naive_entropy(labels, classes)
            assert row.class_entropy == pytest.approx(entropy) if entropy is not None else pd.isna(row.class_entropy)
    assert found.loc["conv1", ["low_share", "high_share"]].notna().any().all()
    assert found.loc["conv2", "low_share"].isna().all()
    expected = filters.aliased_shares_above(network.conv1, network.conv2)
    assert found.loc["conv2", "aliased_share"].tolist() == pytest.approx(expected.tolist())
    assert found.loc["conv5", "aliased_share"].isna().all()


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [([1] * 9, 12, 0), (list(range(9)), 12, 1), ([0, 0, 0, 0, 1, 1, 1, 1, 1], 2, 1), ([1], 5, None), ([], 0, None)],
)
def test_entropy(labels, classes, expected):
    found = units.class_entropy(labels, classes)
    assert found == (None if expected is None else pytest.approx(expected))


def test_two_runs_side_by_side(faulty, make_run, make_shards, capsys):
    other = make_run("other")
    sweep_of(other, make_shards("others", val=[20]))
    ours, theirs = units_of(faulty), units_of(other)
    for _ in range(2):  # the second time it is finished already, and said again
        assert units_comparison.run(derive.Options(run=str(faulty)), str(other)) == 0
        said = capsys.readouterr().out
    assert f"faulty against {other}, 3 layers by place" in said
    dead = [len(units_[units_.dead]) / len(units_) for units_ in (ours, theirs)]
    assert f"dead maps {dead[0]:.1%} against {dead[1]:.1%}" in said
    rows = pd.read_parquet(faulty / "results" / "units_comparison").set_index(["layer", "measure"])
    for layer in LAYERS:
        for measure in ("low_share", "aliased_share", "class_entropy", "dead"):
            for value, units_ in (("value", ours), ("other_value", theirs)):
                assert rows.loc[(layer, measure), value] == pytest.approx(
                    units_.loc[layer, measure].astype(float).mean(), nan_ok=True
                )
    with pytest.raises(RunError, match="holds the same network"):
        units_comparison.run(derive.Options(run=str(faulty)), str(faulty))


def test_tables_that_are_missing_or_of_other_images(make_run, make_shards):
    run = make_run()
    with pytest.raises(RunError, match=r"run jobs/duplicates\.py first"):
        units_of(run)
    sweep_of(run, make_shards(val=[9]))
    sweep_of(run, make_shards("others", train=[1], val=[12]), name="others")
    with pytest.raises(RunError, match="are of different images"):
        units_of(run, duplicates="duplicates-others")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"low": 0.8}, "--low is 0.8, --high is 0.75"),
        ({"nearly_dead": 2}, "--nearly-dead is 2"),
        ({"filter_cosine": 2}, "--filter-cosine is 2"),
        ({"dominance": 0}, "--dominance is 0"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(RunError) as caught:
        units.Config(**config)
    assert words in str(caught.value)
