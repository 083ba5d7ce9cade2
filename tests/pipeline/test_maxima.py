"""What is made of the maxima without a new sweep: groups and near-duplicates, against their definitions."""

import math
import shutil
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import derive, sweep, tables
from pipeline.analyses import duplicates, groups, maxima, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.runs import Run, RunError
from pipeline.storage import Location
from tests.pipeline.exact import assert_same, bits, files, top9_by_definition

LAYERS = {"conv1": "relu1", "conv5": "relu5"}
CUT = {"part_size": 8, "batch_size": 3}


def run_top9(run, data, *, num=0, name=None, **config):
    options = Options(run=str(run), data=str(data), name=name, workers=Workers(num=num, cpus=2))
    return sweep.run(top9.ANALYSIS, options, top9.Config(**{**CUT, "layers": tuple(LAYERS), **config}))


def run_groups(run, name=None, **config):
    return derive.run(groups.ANALYSIS, derive.Options(run=str(run), name=name), groups.Config(**config))


def run_duplicates(run, **config):
    return derive.run(duplicates.ANALYSIS, derive.Options(run=str(run)), duplicates.Config(**config))


@pytest.fixture
def swept(make_run, make_shards):
    """A run with the maxima of 42 images in parts of unequal sizes, and its shards."""
    data, run = make_shards(val=[20, 13, 9]), make_run()
    assert run_top9(run, data) == 0
    return run, data


def rows(run, table, layer, *names):
    found = pq.read_table(run / "results" / table / f"{layer}.parquet")
    return list(zip(*(found[name].to_pylist() for name in names), strict=True))


ENTRY = ("feature_map", "rank", "activation", "key", "row", "col")


def test_maxima_are_every_images_strongest_cells_bit_for_bit(swept):
    run, data = swept
    expected = top9_by_definition(run, data, LAYERS, **CUT, k=10**6)
    for layer in LAYERS:
        table = pq.read_table(run / "results" / "maxima" / f"{layer}.parquet").to_pylist()
        assert len(table) == 42
        found = [
            (feature_map, value, row["key"], *divmod(cell, row["map_width"]))
            for row in table
            for feature_map, (value, cell) in enumerate(zip(row["maxima"], row["cells"], strict=True))
            if value > 0
        ]
        assert sorted(found) == sorted((m, *rest) for m, _, *rest in expected[layer])


@pytest.mark.parametrize("k", [1, 9, 20, 1000])
def test_the_top_group_is_the_table_of_a_sweep_with_that_k(swept, k):
    run, data = swept
    assert run_groups(run, k=k, bottom=False, quantiles=()) == 0
    run_top9(run, data, k=k, name="k")
    for layer in LAYERS:
        one, other = (files(run, table)[f"{layer}.parquet"] for table in ("groups", "top9-k"))
        assert bits(one.select(other.column_names)) == bits(other)


def by_definition(entries, group, k):
    """A group of one map from all its entries (activation, key, ...), as the module's text defines it."""
    ascending = sorted(entries)
    strongest_first = sorted(entries, key=lambda entry: (-entry[0], *entry[1:]))
    if group == "top":
        return strongest_first[:k]
    if group == "bottom":
        return ascending[:k]
    need = math.ceil(Fraction(group[1:]) * len(entries))  # so many must not exceed it
    centre = len(entries) - need
    start = max(0, min(centre - (k - 1) // 2, len(entries) - k))
    return strongest_first[start : start + k]


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("k", [4, 100])
def test_groups_are_their_definition_bit_for_bit(swept, per_class, k):
    run, data = swept
    run_groups(run, k=k, per_class=per_class, quantiles=(0.1, 0.5, 1.0))
    expected = top9_by_definition(run, data, LAYERS, **CUT, k=10**6)
    labels = dict(rows(run, "maxima", "conv1", "key", "label"))
    classes = sorted(set(labels.values())) if per_class else [None]
    for layer in LAYERS:
        wanted = []
        for feature_map in range(max(entry[0] for entry in expected[layer]) + 1):
            entries = [tuple(rest) for m, _, *rest in expected[layer] if m == feature_map]
            for class_ in classes:
                members = [entry for entry in entries if class_ is None or labels[entry[1]] == class_]
                for group in ("top", "q1", "q0.5", "q0.1", "bottom"):
                    chosen = by_definition(members, group, k)
                    wanted += [(class_, group, feature_map, rank, *entry) for rank, entry in enumerate(chosen, start=1)]
        assert rows(run, "groups", layer, "class", "group", *ENTRY) == wanted


def test_a_quantile_lies_in_the_middle_of_its_group(swept):
    run, _ = swept
    run_groups(run, k=5, quantiles=(0.5,))
    frame = pd.read_parquet(run / "results" / "groups").query("layer == 'conv1'")
    alive = {m: sorted(v for (v,) in some) for m, some in _alive(run, "conv1").items()}
    for feature_map, some in frame[frame.group == "q0.5"].groupby("feature_map"):
        values = alive[feature_map]
        assert some.activation.iloc[2] == values[math.ceil(len(values) / 2) - 1]
        assert (some["quantile"] == 0.5).all()
    assert frame[frame.group == "top"]["quantile"].isna().all()


def _alive(run, layer):
    found = {}
    for (values,) in rows(run, "maxima", layer, "maxima"):
        for feature_map, value in enumerate(values):
            if value > 0:
                found.setdefault(feature_map, []).append((value,))
    return {feature_map: some for feature_map, some in found.items() if len(some) >= 5}


def test_ties_go_by_key_from_either_end():
    values = np.array([[2, 0], [1, 3], [2, 3], [1, -1], [1, 3]], np.float32)
    found = groups._choose(groups.Config(k=3, quantiles=()), values)
    entries = list(zip(*(getattr(found, name).tolist() for name in ("map", "group", "rank", "image")), strict=True))
    assert sorted(entries) == [
        (0, 0, 1, 0),
        (0, 0, 2, 2),
        (0, 0, 3, 1),
        (0, 1, 1, 1),
        (0, 1, 2, 3),
        (0, 1, 3, 4),
        (1, 0, 1, 1),
        (1, 0, 2, 2),
        (1, 0, 3, 4),
        (1, 1, 1, 1),
        (1, 1, 2, 2),
        (1, 1, 3, 4),
    ]


def test_how_much_is_held_at_once_changes_nothing(swept, tmp_path, monkeypatch):
    run, _ = swept
    other = tmp_path / "other"
    shutil.copytree(run, other)
    run_groups(run, per_class=True)
    monkeypatch.setattr(maxima, "BLOCK_BYTES", 32 * 42 * 7)
    monkeypatch.setattr(groups, "_ROWS_TOGETHER", 300)
    monkeypatch.setattr("pipeline.tables._STREAMED_ROWS", 5)
    run_groups(other, per_class=True)
    assert_same(run, other, "groups")


def test_maxima_do_not_depend_on_the_workers(swept, ray_cluster, tmp_path):
    run, data = swept
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("results"))
    run_top9(other, data, num=2)
    assert_same(run, other, "maxima", "top9", "feature_maps")


@pytest.mark.parametrize(("few", "row_groups"), [(1, 7), (10, 4), (1000, 4)])
def test_maxima_do_not_depend_on_how_many_parts_are_joined(swept, tmp_path, monkeypatch, few, row_groups):
    run, data = swept
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("results"))
    monkeypatch.setattr("pipeline.fold.FAN_IN", 2)
    monkeypatch.setattr("pipeline.tables.ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(top9, "_FEW", few)
    run_top9(other, data)
    assert_same(run, other, "maxima", "top9", "feature_maps")
    written = [pq.ParquetFile(at / "results" / "maxima" / "conv1.parquet").num_row_groups for at in (run, other)]
    assert written == [1, row_groups], "seven parts one by one, or in pairs"


def test_parts_of_few_images_are_joined_and_those_without_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(top9, "_FEW", 2)
    schema = top9.part_schema(top9.Config())
    lists = {field.name: [1.0] if pa.types.is_list(field.type) else 4 for field in schema} | {"layer": "conv1"}
    for name, rows in {"empty": [], "one": [lists]}.items():
        tables.write(pa.Table.from_pylist(rows, schema), Location.of(tmp_path / f"{name}.parquet"))
    empty, one = (Location.of(tmp_path / f"{name}.parquet") for name in ("empty", "one"))
    assert top9._kept("conv1", [empty, empty]) == []
    both, rest = top9._kept("conv1", [empty, one, empty, one, one])
    assert {name: np.asarray(value).tolist() for name, value in both.items()} == {
        "number": [1, 1],
        "maxima": [1.0, 1.0],
        "positions": [1, 1],
        "map_width": 4,
        "cells": 4,
    }
    assert rest["number"].tolist() == [1]


def test_duplicates_are_the_pairs_that_correlate(swept):
    run, _ = swept
    run_duplicates(run, correlation=0.5, nearest=0)
    for layer in LAYERS:
        values = np.array([v for (v,) in rows(run, "maxima", layer, "maxima")], dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.corrcoef(values.T)
        wanted = {(i, j) for i, j in zip(*np.nonzero(expected >= 0.5), strict=True) if i < j}
        found = rows(run, "duplicates", layer, "feature_map", "other_map", "correlation", "images")
        assert wanted
        assert {(i, j) for i, j, _, _ in found} == wanted
        assert all(abs(expected[i, j] - r) < 1e-12 and n == 42 for i, j, r, n in found)
        assert [r for _, _, r, _ in found] == sorted((r for _, _, r, _ in found), reverse=True)


def test_each_maps_nearest_are_kept_whatever_their_correlation(swept):
    run, _ = swept
    run_duplicates(run, correlation=0.7, nearest=2)
    for layer in LAYERS:
        values = np.array([v for (v,) in rows(run, "maxima", layer, "maxima")], dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = np.corrcoef(values.T)
        changing = [i for i in range(len(expected)) if np.isfinite(expected[i, i])]
        wanted = {(i, j) for i in changing for j in changing if i < j and expected[i, j] >= 0.7}
        nearest = {i: sorted(set(changing) - {i}, key=lambda j: -expected[i, j])[:2] for i in changing}
        pairs = {(min(i, j), max(i, j)) for i, found in nearest.items() for j in found}
        found = {
            (i, j): alike for i, j, alike in rows(run, "duplicates", layer, "feature_map", "other_map", "duplicate")
        }
        assert pairs - wanted
        assert set(found) == wanted | pairs
        assert {pair for pair, alike in found.items() if alike} == wanted


def test_a_map_and_its_copy_are_duplicates(make_run, make_shards):
    data, run = make_shards(val=[12]), make_run()
    model = Run.at(str(run)).load_model()
    with torch.no_grad():
        for parameter in (model.network.conv1.weight, model.network.conv1.bias):
            parameter[5] = 2 * parameter[3]
        model.network.conv1.weight[[7, 8]] = 0
        model.network.conv1.bias[[7, 8]] = 0.1  # constant maps are nobody's duplicates
    Run.at(str(run)).save_model(
        model.network, architecture="zfnet_small", classes=model.classes, preprocessing=model.preprocessing, about={}
    )
    run_top9(run, data, layers=("conv1",))
    run_duplicates(run, correlation=0.999999, nearest=0)
    found = rows(run, "duplicates", "conv1", "feature_map", "other_map")
    assert (3, 5) in found
    assert not {7, 8} & {m for pair in found for m in pair}


def test_maxima_above_the_budget_are_not_kept(make_run, make_shards, capsys):
    data, run = make_shards(val=[5]), make_run()
    takes = 6 * 5 * (32 + 64) / 1e9
    run_top9(run, data, maxima_gb=takes * 0.99)
    assert "are not kept (--maxima-gb" in capsys.readouterr().out
    assert not (run / "results" / "maxima").exists()
    with pytest.raises(RunError, match=r"no slice any of maxima .+which has none: run jobs/top9.py"):
        run_groups(run)
    before = {path: path.stat().st_mtime_ns for path in (run / "results").glob("[tf]*/*.parquet")}
    run_top9(run, data, maxima_gb=takes * 1.01)
    assert run_groups(run) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    run_top9(run, data, maxima_gb=0.0)
    assert len(list((run / "results" / "maxima").iterdir())) == 2


def test_parts_without_maxima_do_not_serve_a_sweep_that_keeps_them(make_run, make_shards, monkeypatch):
    data, run = make_shards(val=[20]), make_run()
    with monkeypatch.context() as patch:
        calls = []

        def breaks(context, results):
            calls.append(results)
            if len(calls) == 2:
                raise RunError("the power went")
            return top9.reduce_part(context, results)

        patch.setattr(top9, "ANALYSIS", replace(top9.ANALYSIS, reduce_part=breaks))
        with pytest.raises(SweepFailed, match="the power went"):
            run_top9(run, data, maxima_gb=0.0)
    run_top9(run, data)
    assert len(rows(run, "maxima", "conv1", "key")) == 20
    assert not (run / "unfinished" / "top9").exists()


def test_a_finished_slice_of_groups_is_never_rewritten(swept, capsys):
    run, _ = swept
    run_groups(run, layers=("conv1",))
    path = run / "results" / "groups" / "conv1.parquet"
    before = path.stat().st_mtime_ns
    run_groups(run)
    assert path.stat().st_mtime_ns == before
    run_groups(run)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"k: finished with 9, asked 3.+--name"):
        run_groups(run, k=3)
    assert run_groups(run, k=3, name="three") == 0
    assert pd.read_parquet(run / "results" / "groups-three")["rank"].max() == 3
    assert not (run / "unfinished" / "groups").exists()
    with pytest.raises(RunError, match="no slice conv9"):
        run_groups(run, layers=("conv9",))


def test_maxima_of_another_model_are_refused(swept, make_run):
    run, _ = swept
    other = make_run("other", seed=1)
    for name in ("model/weights.safetensors", "run.json"):
        shutil.copy(other / name, run / name)
    with pytest.raises(RunError, match="was made with model .+ bring that model back"):
        run_groups(run)


def test_images_without_a_label_are_in_no_class(make_run, tmp_path):
    from pipeline.indexing import index_shards
    from tests.conftest import samples
    from tests.tars import write_tar

    data, run = tmp_path / "data", make_run()
    data.mkdir()
    pictures = [(key, members if i % 2 else {"jpg": members["jpg"]}) for i, (key, members) in enumerate(samples(8))]
    write_tar(data / "val-0.tar", pictures)
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run_top9(run, data)
    run_groups(run, per_class=True)
    frame = pd.read_parquet(run / "results" / "groups")
    assert set(frame.key) == {key for i, (key, _) in enumerate(pictures) if i % 2}
    assert (frame["class"] == frame.label).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"k": 0}, "--k is 0"),
        ({"quantiles": (0.5, 1.5)}, "--quantiles has 1.5"),
        ({"quantiles": (0.5, 0.5)}, "one twice"),
        ({"top": False, "bottom": False, "quantiles": ()}, "leave no group"),
    ],
)
def test_what_groups_cannot_be_is_refused(config, words):
    with pytest.raises(RunError, match=words):
        groups.Config(**config)
