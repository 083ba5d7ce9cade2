"""Sweeps end to end: exact, the same for any number of actors, resumable, and never silently incomplete."""

import contextlib
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import lease, sweep, work
from pipeline.actor import PartActor, torch_settings_kept
from pipeline.analyses import deconv, occlusion, top9
from pipeline.cluster import CannotSchedule, Resources, Workers
from pipeline.context import Options, normalised
from pipeline.errors import SweepFailed
from pipeline.runs import Run, RunError
from pipeline.storage import StorageError
from pipeline.work import Cut
from tests.conftest import samples
from tests.pipeline.exact import assert_same, files, top9_by_definition
from tests.tars import write_tar
from zfnet.deconv import Semantics
from zfnet.graph import UnknownLayer

LAYERS = {f"conv{i}": f"relu{i}" for i in range(1, 6)}
IN_PROCESS = Workers(num=0, cpus=2)
UNEQUAL = [20, 13, 9]  # at part size 8: parts of 8, 8, 4, 8, 5, 8, 1


def run_top9(run, data, *, workers=IN_PROCESS, part_size=8, batch_size=3, name=None, max_skipped=0.01, **config):
    options = Options(run=str(run), data=str(data), workers=workers, name=name, max_skipped=max_skipped)
    return sweep.run(top9.ANALYSIS, options, top9.Config(part_size=part_size, batch_size=batch_size, **config))


def run_deconv(run, data, **config):
    options = Options(run=str(run), data=str(data), workers=IN_PROCESS)
    return sweep.run(deconv.ANALYSIS, options, deconv.Config(**{"part_size": 16, "batch_size": 4, **config}))


def run_occlusion(run, data, **config):
    options = Options(run=str(run), data=str(data), workers=IN_PROCESS)
    small = {"first": 3, "occluder_px": ("24",), "stride_px": 20, "part_size": 2}
    return sweep.run(occlusion.ANALYSIS, options, occlusion.Config(**{**small, **config}))


def rows_of(run, layer):
    table = pq.read_table(run / "results" / "top9" / f"{layer}.parquet")
    return list(
        zip(*(table[n].to_pylist() for n in ("feature_map", "rank", "activation", "key", "row", "col")), strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- exact


def test_top9_is_the_brute_force_bit_for_bit(make_run, make_shards, ray_cluster, tmp_path):
    data = make_shards(val=UNEQUAL)
    run = make_run()
    assert run_top9(run, data) == 0
    expected = top9_by_definition(run, data, LAYERS, part_size=8, batch_size=3)
    for layer in LAYERS:
        assert rows_of(run, layer) == expected[layer], layer
    for actors in (1, 3):
        again = tmp_path / f"{actors}-actors"
        shutil.copytree(run, again, ignore=shutil.ignore_patterns("results"))
        assert run_top9(again, data, workers=Workers(num=actors, cpus=1)) == 0
        assert_same(run, again, "top9", "feature_maps")


def test_top9_of_real_photographs_is_the_brute_force(make_run, shared_data, tmp_path):
    from pipeline.indexing import index_shards

    folder = shared_data("tiny-imagenet-10")
    index_shards([str(folder / "val-000000.tar")], str(tmp_path / "data"), classes=None, accept_damaged=False)
    run = make_run(classes=tuple(str(i) for i in range(10)))
    assert run_top9(run, tmp_path / "data", part_size=70, batch_size=16, layers=("conv3", "conv5")) == 0
    layers = {layer: LAYERS[layer] for layer in ("conv3", "conv5")}
    expected = top9_by_definition(run, tmp_path / "data", layers, part_size=70, batch_size=16)
    for layer in layers:
        assert rows_of(run, layer) == expected[layer]


@pytest.fixture
def integer_run(make_run, monkeypatch):
    """A network whose arithmetic is exact: small integer weights, whole pixels, no normalisation before conv2."""

    def make():
        run = make_run("integers")
        model = Run.at(str(run)).load_model()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.network.parameters():
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).float()
        Run.at(str(run)).save_model(
            model.network,
            architecture="zfnet_small",
            classes=model.classes,
            preprocessing=model.preprocessing,
            about={},
        )
        return run

    return make


def test_an_integer_network_gives_the_same_table_however_the_shards_are_cut(integer_run, tmp_path):
    from pipeline.indexing import index_shards

    pictures = samples(30, seed=5)
    tables = []
    for number, (sizes, part_size, batch_size) in enumerate([([30], 8, 3), ([7, 1, 22], 5, 4), ([15, 15], 30, 30)]):
        data = tmp_path / f"data{number}"
        data.mkdir()
        order = np.random.default_rng(number).permutation(30)
        for shard, chosen in enumerate(np.split(order, np.cumsum(sizes)[:-1])):
            write_tar(data / f"val-{shard}.tar", [pictures[i] for i in chosen])
        index_shards([str(p) for p in data.glob("*.tar")], str(data), classes=None, accept_damaged=False)
        run = integer_run()
        shutil.rmtree(run / "results", ignore_errors=True)
        assert run_top9(run, data, part_size=part_size, batch_size=batch_size, layers=("conv1",)) == 0
        tables.append(files(run, "top9")["conv1.parquet"].drop_columns(["shard", "data_id"]))
        assert (run / "results" / "top9").is_dir()
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_feature_maps_say_what_the_activations_are(make_run, make_shards):
    data, run = make_shards(val=[11]), make_run()
    run_top9(run, data)
    frame = pd.read_parquet(run / "results" / "feature_maps").query("layer == 'conv2'")
    expected = top9_by_definition(run, data, {"conv2": "relu2"}, part_size=8, batch_size=3, k=99)["conv2"]
    for feature_map, row in enumerate(frame.itertuples()):
        maxima = [entry[2] for entry in expected if entry[0] == feature_map]
        assert row.images == 11
        assert row.maximum == pytest.approx(max(maxima, default=0))
        assert row.active_share == len(maxima) / 11
        assert row.dead == (not maxima)
        assert sum(row.histogram) == len(maxima)
        assert row.q05 <= row.q25 <= row.q50 <= row.q75 <= row.q95 <= row.q99 <= row.maximum


def test_dead_maps_have_no_rows(make_run, make_shards):
    data, run = make_shards(val=[5]), make_run()
    model = Run.at(str(run)).load_model()
    model.network.conv5.bias.data[3] = -1e6
    Run.at(str(run)).save_model(
        model.network, architecture="zfnet_small", classes=model.classes, preprocessing=model.preprocessing, about={}
    )
    run_top9(run, data)
    assert not [row for row in rows_of(run, "conv5") if row[0] == 3]
    frame = pd.read_parquet(run / "results" / "feature_maps")
    assert 3 in frame[frame.dead].query("layer == 'conv5'").feature_map.tolist()
    assert run_deconv(run, data) == 0


def test_parts_are_cut_by_shard_and_size(make_shards):
    from pipeline.shards import Index

    rows = Index.load(str(make_shards(val=UNEQUAL))).split("val")
    parts = Cut(rows, 8)
    assert [part.num_rows for part in parts] == [8, 8, 4, 8, 5, 8, 1]
    assert [key for part in parts for key in part["key"].to_pylist()] == rows["key"].to_pylist()


# ----------------------------------------------------------------------------------------- deconv and occlusion


def test_deconv_projects_every_row_of_top9(make_run, make_shards):
    data, run = make_shards(val=[20]), make_run()
    run_top9(run, data)
    assert run_deconv(run, data) == 0
    top = pd.read_parquet(run / "results" / "top9")
    projected = pd.read_parquet(run / "results" / "deconv")
    keys = ["layer", "feature_map", "rank"]
    joined = top.merge(
        projected, on=[*keys, "key", "row", "col", "activation", "top", "left"], how="outer", indicator=True
    )
    assert set(joined._merge) == {"both"}
    for layer, rows in projected.groupby("layer"):
        assert rows[keys].equals(rows[keys].sort_values(keys)), layer
    for row in projected.sample(40, random_state=0).itertuples():
        pixels = np.asarray(row.projection).reshape(row.projection_height, row.projection_width, 3)
        assert row.projection_scale == np.abs(pixels).max()
        assert row.projection_height == min(row.top + row.height, 64) - max(row.top, 0)
        assert row.projection_width == min(row.left + row.width, 64) - max(row.left, 0)
        assert 0 <= row.box_top <= row.box_top + row.box_height <= 80 + 1e-3
        assert 0 <= row.box_left <= row.box_left + row.box_width <= 96 + 1e-3


def test_deconv_of_whole_maps_covers_the_image_and_says_so(make_run, make_shards):
    data, run = make_shards(val=[6]), make_run()
    run_top9(run, data, layers=("conv2",))
    assert run_deconv(run, data, semantics=Semantics(cells="all", seed="one", normalisation="gradient")) == 0
    rows = pd.read_parquet(run / "results" / "deconv")
    assert set(zip(rows.projection_height, rows.projection_width, strict=True)) == {(64, 64)}
    made_with = rows[["cells", "seed", "unpool", "normalisation", "relu"]].drop_duplicates().to_dict("records")
    assert made_with == [
        {"cells": "all", "seed": "one", "unpool": "sum", "normalisation": "gradient", "relu": "deconvnet"}
    ]


def test_deconv_does_not_care_how_its_work_is_cut(make_run, make_shards, tmp_path):
    data, run = make_shards(val=[20]), make_run()
    run_top9(run, data)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    run_deconv(run, data, part_size=16, batch_size=4)
    run_deconv(other, data, part_size=3, batch_size=2)
    for name, table in files(run, "deconv").items():
        again = files(other, "deconv")[name]
        assert table.drop_columns(["projection", "projection_scale"]).equals(
            again.drop_columns(["projection", "projection_scale"])
        )
        one, two = (np.concatenate(t["projection"].to_numpy()) for t in (table, again))
        assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()


@pytest.mark.parametrize("values", ["float16", "png"])
def test_smaller_values_are_close_to_float32(make_run, make_shards, tmp_path, values):
    import io

    from PIL import Image

    data, run = make_shards(val=[6]), make_run()
    run_top9(run, data, layers=("conv2",))
    smaller = tmp_path / "smaller"
    shutil.copytree(run, smaller)
    run_deconv(run, data)
    run_deconv(smaller, data, values=values)
    exact, rough = (pd.read_parquet(folder / "results" / "deconv") for folder in (run, smaller))
    for one, two in zip(exact.itertuples(), rough.itertuples(), strict=True):
        if values == "png":
            image = np.asarray(Image.open(io.BytesIO(two.projection)), dtype=np.float32)
            found = ((image - 128) / 127 * two.projection_scale).reshape(-1)
        else:
            found = np.asarray(two.projection, dtype=np.float32) * two.projection_scale
        assert np.abs(found - one.projection).max() <= one.projection_scale / 250


def test_deconv_without_top9_names_the_job(make_run, make_shards):
    with pytest.raises(RunError, match=r"run jobs/top9.py first"):
        run_deconv(make_run(), make_shards(val=[3]))


def test_deconv_refuses_other_images_than_the_sweeps(make_run, make_shards):
    run = make_run()
    run_top9(run, make_shards(val=[4]))
    with pytest.raises(RunError, match="was made of"):
        run_deconv(run, make_shards("others", val=[5]))


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_deconv_notices_activations_that_do_not_come_back(make_run, make_shards, change):
    data, run = make_shards(val=[4]), make_run()
    run_top9(run, data, layers=("conv2",))
    path = run / "results" / "top9" / "conv2.parquet"
    table = pq.read_table(path)
    values = table["activation"].to_numpy().copy()
    values[7] += change * values.max()
    column = table.schema.get_field_index("activation")
    pq.write_table(table.set_column(column, table.schema.field(column), [values]), path)
    with pytest.raises(SweepFailed, match="the shards were changed since"):
        run_deconv(run, data)


def test_large_projections_leave_the_choice_to_the_user(make_run, make_shards, monkeypatch):
    data, run = make_shards(val=[4]), make_run()
    run_top9(run, data)
    monkeypatch.setattr(deconv, "ASK_ABOVE_BYTES", 1000)
    with pytest.raises(RunError, match=r"choose with --values"):
        run_deconv(run, data)
    assert run_deconv(run, data, values="png") == 0


def test_occlusion_writes_the_papers_three_maps(make_run, make_shards):
    data, run = make_shards(val=[5]), make_run()
    assert run_occlusion(run, data) == 0
    frame = pd.read_parquet(run / "results" / "occlusion")
    assert len(frame) == 3
    for row in frame.itertuples():
        assert (row.grid_rows, row.grid_cols) == (3, 3)
        assert len(row.activation_map) == len(row.probability_map) == len(row.class_map) == 9
        assert row.target_class == row.label
        assert row.layer == "conv5"
        assert len(row.projection) == row.projection_height * row.projection_width * 3


def test_occlusion_chooses_by_key_and_class(make_run, make_shards, tmp_path):
    data, run = make_shards(val=[12]), make_run()
    keys = ("s0-0007", "s0-0002")
    run_occlusion(run, data, keys=keys)
    assert pd.read_parquet(run / "results" / "occlusion").key.tolist() == ["s0-0002", "s0-0007"]
    with pytest.raises(RunError, match="no key 'nope'"):
        run_occlusion(run, data, keys=("nope",))
    with pytest.raises(RunError, match="no class 'purple'"):
        run_occlusion(run, data, label="purple")
    other = tmp_path / "by-class"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("results"))
    run_occlusion(other, data, label="green", first=2)
    assert set(pd.read_parquet(other / "results" / "occlusion").label_name) == {"green"}


# ----------------------------------------------------------------------------------- slices, resume, refusals


def test_a_finished_slice_is_never_rewritten(make_run, make_shards, capsys):
    data, run = make_shards(val=[6]), make_run()
    run_top9(run, data, layers=("conv1",))
    before = {path: path.stat().st_mtime_ns for path in (run / "results" / "top9").iterdir()}
    assert run_top9(run, data, layers=("conv1",)) == 0
    assert "finished already" in capsys.readouterr().out
    run_top9(run, data, layers=("conv1", "conv4"))
    after = {path.name: path.stat().st_mtime_ns for path in (run / "results" / "top9").iterdir()}
    assert sorted(after) == ["conv1.parquet", "conv4.parquet"]
    assert all(after[path.name] == time for path, time in before.items())
    with pytest.raises(RunError, match=r"k: finished with 9, asked 5.+--name"):
        run_top9(run, data, layers=("conv1",), k=5)
    assert run_top9(run, data, layers=("conv1",), k=5, name="five") == 0
    assert sorted(path.name for path in (run / "results").iterdir() if path.is_dir()) == [
        "account",
        "feature_maps",
        "feature_maps-five",
        "manifests",
        "maxima",
        "maxima-five",
        "skipped",
        "top9",
        "top9-five",
    ]


def break_after(monkeypatch, parts):
    """Let every part after the first few fail, as if the power went."""
    reduced = itertools.count()

    def breaks(context, results):
        if next(reduced) >= parts:
            raise RunError("the power went")
        return top9.reduce_part(context, results)

    monkeypatch.setattr(top9, "ANALYSIS", replace(top9.ANALYSIS, reduce_part=breaks))


def test_an_interrupted_sweep_goes_on_where_it_stopped(make_run, make_shards, tmp_path, monkeypatch):
    data, run = make_shards(val=UNEQUAL), make_run()
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(run, undisturbed)
    run_top9(undisturbed, data)
    with monkeypatch.context() as patch:
        break_after(patch, 3)
        with pytest.raises(SweepFailed, match=r"(?s)the power went.+[45] of 7 parts are not done"):  # two at once
            run_top9(run, data)
    assert not (run / "results").exists()
    done = [int(path.stem[5:]) for path in (run / "unfinished" / "top9").glob("*/parts/*")]
    assert run_top9(run, data) == 0
    assert_same(run, undisturbed, "top9", "feature_maps")
    account = pd.read_parquet(run / "results" / "account").set_index("part")
    assert (account.attempts[done] == 1).all()
    assert account.attempts.max() == 2
    assert account.samples.sum() == sum(UNEQUAL)
    assert not (run / "unfinished" / "top9").exists()


def test_parts_made_elsewhere_are_not_mixed_in(make_run, make_shards, monkeypatch):
    data, run = make_shards(val=UNEQUAL), make_run()
    with monkeypatch.context() as patch:
        break_after(patch, 3)
        patch.setattr(work, "environment", lambda device: {"cpu_capability": "AVX512"})
        with pytest.raises(SweepFailed):
            run_top9(run, data)
    monkeypatch.setattr(work, "environment", lambda device: {"cpu_capability": "AVX2"})
    with pytest.raises(SweepFailed, match="computed elsewhere .cpu_capability: 'AVX512' then, 'AVX2' now"):
        run_top9(run, data)


def test_skipped_samples_are_counted_and_named(make_run, tmp_path, capsys):
    from pipeline.indexing import index_shards

    data = tmp_path / "data"
    data.mkdir()
    pictures = samples(10)
    pictures[3] = (pictures[3][0], {"jpg": pictures[3][1]["jpg"][:300]})
    pictures[5] = (pictures[5][0], {"jpg": b""})
    pictures[7] = (pictures[7][0], {"cls": b"1"})
    write_tar(data / "val-0.tar", pictures)
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run = make_run()
    assert run_top9(run, data) == 3
    assert "3 of 10 samples skipped" in capsys.readouterr().out
    skipped = pd.read_parquet(run / "results" / "skipped")
    assert dict(zip(skipped.key, skipped.reason, strict=True)) == {
        pictures[3][0]: "bad_image",
        pictures[5][0]: "empty_file",
        pictures[7][0]: "no_image",
    }
    entry = json.loads((run / "results" / "manifests" / "top9" / "conv1.json").read_text())
    assert entry["samples"] == 10
    assert sum(entry["skipped"].values()) == 3
    assert pd.read_parquet(run / "results" / "feature_maps").images.unique().tolist() == [7]
    assert run_top9(run, data, max_skipped=0.3) == 0


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_batch_is_the_same_images_whatever_is_read_together(make_run, tmp_path, threads):
    from pipeline.indexing import index_shards

    data = tmp_path / "data"
    data.mkdir()
    pictures = samples(20)
    for broken in (0, 3, 4, 5, 13):  # a batch of 3 is lost whole
        pictures[broken] = (pictures[broken][0], {"jpg": b"broken"})
    write_tar(data / "val-0.tar", pictures)
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    given = Options(run=str(make_run()), data=str(data)), top9.Config(layers=("conv1",), batch_size=3), ["conv1"]
    seen = []

    def batch(context, state, some):
        seen.append([picture.sample.key for picture in some])
        return normalised(context, state, some)

    with torch_settings_kept():
        actor = PartActor(top9.__name__, *given, Resources(1, threads, 0.0), "session", None)
        actor.analysis = replace(actor.analysis, batch=batch)
        _, skipped = actor.compute(0)
    keys = [key for key, _ in pictures]
    assert [sample.key for sample in skipped] == [keys[i] for i in (0, 3, 4, 5, 13)]
    good = [[k for k in keys[i : i + 3] if k not in {s.key for s in skipped}] for i in range(0, 20, 3)]
    assert sorted(seen) == sorted(filter(None, good))


def test_images_without_labels_are_swept(make_run, tmp_path):
    from pipeline.indexing import index_shards

    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "val-0.tar", [(key, {"jpg": members["jpg"]}) for key, members in samples(4)])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run = make_run()
    assert run_top9(run, data) == 0
    assert run_occlusion(run, data) == 0
    assert pd.read_parquet(run / "results" / "top9").label.isna().all()
    occluded = pd.read_parquet(run / "results" / "occlusion")
    assert (occluded.target_class == occluded.clean_class).all()


def test_nothing_readable_is_an_error(make_run, tmp_path):
    from pipeline.indexing import index_shards

    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "val-0.tar", [("a", {"jpg": b"x"}), ("b", {"jpg": b"y"})])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run = make_run()
    with pytest.raises(SweepFailed, match=r"not one image could be read \(2 bad_image\)"):
        run_top9(run, data)
    assert not (run / "results").exists()


def test_nan_fails_the_part_and_names_the_key(make_run, make_shards):
    data, run = make_shards(val=[4]), make_run()
    model = Run.at(str(run)).load_model()
    model.network.conv2.bias.data[0] = float("nan")
    Run.at(str(run)).save_model(
        model.network, architecture="zfnet_small", classes=model.classes, preprocessing=model.preprocessing, about={}
    )
    with pytest.raises(SweepFailed, match=r"sample 's0-000\d': feature map .+ is NaN or infinite"):
        run_top9(run, data)


def test_an_unknown_layer_is_refused_with_the_nearest(make_run, make_shards):
    with pytest.raises(UnknownLayer, match="conv9.+conv"):
        run_top9(make_run(), make_shards(val=[3]), layers=("conv9",))


def test_a_run_without_a_model_names_the_job(tmp_path, make_shards):
    with pytest.raises(RunError, match=r"jobs/train.py"):
        run_top9(tmp_path / "empty", make_shards(val=[3]))


def test_a_replaced_model_is_noticed(make_run, make_shards):
    data, run, other = make_shards(val=[3]), make_run(), make_run("other", seed=1)
    shutil.copy(other / "model" / "weights.safetensors", run / "model" / "weights.safetensors")
    with pytest.raises(RunError, match="one of the two was replaced"):
        run_top9(run, data)
    (run / "model" / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(RunError, match="cannot be loaded"):
        run_top9(run, data)


def test_results_of_another_model_are_not_added_to(make_run, make_shards):
    data, run, other = make_shards(val=[3]), make_run(), make_run("other", seed=1)
    run_top9(run, data)
    for name in ("model/weights.safetensors", "run.json"):
        shutil.copy(other / name, run / name)
    with pytest.raises(RunError, match="model_id: finished with"):
        run_top9(run, data)


def test_a_run_that_cannot_be_written_is_refused(make_run, make_shards):
    data, run = make_shards(val=[3]), make_run()
    (run / "unfinished").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="cannot"):
        run_top9(run, data)


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(num=9, cpus=1), "9 workers of 1 CPUs .+ were asked for, 4 fit"),
        (Workers(cpus=64), "64 CPUs .+ 0 fit"),
        (Workers(gpus=1), "1 GPUs; the cluster has 1 nodes: 4 CPUs and 0 GPUs"),
    ],
)
def test_what_can_never_be_scheduled_is_refused(make_run, make_shards, ray_cluster, workers, message):
    with pytest.raises(CannotSchedule, match=message):
        run_top9(make_run(), make_shards(val=[3]), workers=workers)


def test_deconv_is_made_again_for_another_top9(make_run, make_shards):
    """The table it is made of is part of its identity."""
    data, run = make_shards(val=[12]), make_run()
    run_top9(run, data, layers=("conv2",), k=3)
    run_deconv(run, data)
    shutil.rmtree(run / "results" / "top9")
    shutil.rmtree(run / "results" / "manifests" / "top9")
    run_top9(run, data, layers=("conv2",), k=9, name="nine")
    with pytest.raises(RunError, match="run jobs/top9.py first"):
        run_deconv(run, data)
    for table in ("feature_maps", "maxima"):
        shutil.rmtree(run / "results" / table)
        shutil.rmtree(run / "results" / "manifests" / table)
    run_top9(run, data, layers=("conv2",), k=9)
    with pytest.raises(RunError, match="sources: finished with"):
        run_deconv(run, data)


def test_layers_asked_for_after_an_interrupted_deconv_lose_no_row(make_run, make_shards, monkeypatch):
    """Other layers need other images, so their parts are other parts."""
    data, run = make_shards(val=[40]), make_run()
    run_top9(run, data, layers=("conv1", "conv2", "conv5"))
    with monkeypatch.context() as patch:
        calls = []

        def breaks(context, results):
            calls.append(results)
            if len(calls) == 3:
                raise RunError("the power went")
            return deconv.reduce_part(context, results)

        patch.setattr(deconv, "ANALYSIS", replace(deconv.ANALYSIS, reduce_part=breaks))
        with pytest.raises(SweepFailed, match="the power went"):
            run_deconv(run, data, part_size=8)
    for layers in (("conv2",), ("conv1",), ()):
        run_deconv(run, data, part_size=8, layers=layers)
    keys = ["layer", "feature_map", "rank", "key"]
    top, projected = (pd.read_parquet(run / "results" / name)[keys] for name in ("top9", "deconv"))
    assert len(projected) == len(top)
    assert len(projected.merge(top)) == len(top)
    assert not (run / "unfinished" / "deconv").exists()


def test_parts_of_other_samples_are_refused(make_run, make_shards, monkeypatch):
    data, run = make_shards(val=UNEQUAL), make_run()
    with monkeypatch.context() as patch:
        break_after(patch, 3)
        with pytest.raises(SweepFailed):
            run_top9(run, data)
    (folder,) = (run / "unfinished" / "top9").glob("*/parts")
    shutil.copy(folder / "part-000000.parquet", folder / "part-000003.parquet")
    with pytest.raises(RunError, match="part-000003.parquet holds other samples than it should"):
        run_top9(run, data)


@pytest.mark.parametrize("part", [1, 4])
def test_two_runs_of_one_job_do_not_break_each_other(make_run, make_shards, tmp_path, monkeypatch, capsys, part):
    """Both hold the lease; the second finishes, and clears up, while the first is at work."""
    monkeypatch.setattr(lease, "held", lambda *given, **options: contextlib.nullcontext())
    data, run = make_shards(val=UNEQUAL), make_run()
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(run, undisturbed)
    run_top9(undisturbed, data)
    calls = []

    def overtaken(context, results):
        calls.append(results)
        if len(calls) == part:
            assert run_top9(run, data) == 0
        return top9.reduce_part(context, results)

    monkeypatch.setattr(top9, "ANALYSIS", replace(top9.ANALYSIS, reduce_part=overtaken))
    assert run_top9(run, data) == 0
    # By the fourth part some are committed for sure, which the second run clears up.
    assert "another run of this job finished it meanwhile" in capsys.readouterr().out or part < 4
    assert_same(run, undisturbed, "top9", "feature_maps")
    assert not (run / "unfinished").exists() or not list((run / "unfinished").iterdir())


def test_another_configuration_that_finished_meanwhile_is_not_overwritten(make_run, make_shards, monkeypatch):
    """Even where leases do not hold it off, as when this process stood still for long."""
    monkeypatch.setattr(lease, "held", lambda *given, **options: contextlib.nullcontext())
    monkeypatch.setattr(lease, "require_free", lambda *given: None)
    data, run = make_shards(val=UNEQUAL), make_run()
    fold = top9.fold

    def overtaken(context, parts, layers):
        if context.config.k == 9:
            run_top9(run, data, k=5)
        yield from fold(context, parts, layers)

    plain = top9.ANALYSIS
    with pytest.raises(RunError, match="k: finished with 5, asked 9"):
        sweep.run(
            replace(plain, fold=overtaken),
            Options(run=str(run), data=str(data), workers=IN_PROCESS),
            top9.Config(part_size=8, batch_size=3),
        )
    assert pd.read_parquet(run / "results" / "top9")["rank"].max() == 5


@pytest.mark.parametrize("written", range(1, 10, 2))
def test_a_crash_between_two_manifests_costs_no_part(make_run, make_shards, tmp_path, monkeypatch, written):
    data, run = make_shards(val=UNEQUAL), make_run()
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(run, undisturbed)
    run_top9(undisturbed, data)
    finish, calls = Run.finish, []

    def dies(self, table, slice_, entry, staging):
        if len(calls) == written:
            raise RunError("the power went")
        calls.append(slice_)
        finish(self, table, slice_, entry, staging)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", dies)
        with pytest.raises(RunError, match="the power went"):
            run_top9(run, data)
    before = {path.name: path.stat().st_mtime_ns for path in (run / "results" / "top9").iterdir()}
    assert run_top9(run, data) == 0
    assert_same(run, undisturbed, "top9", "feature_maps")
    account = pd.read_parquet(run / "results" / "account")
    assert (account.attempts == 1).all()
    assert len(account) == 7
    finished = [f"{slice_}.parquet" for slice_ in set(calls[: written - 1])]
    after = {path.name: path.stat().st_mtime_ns for path in (run / "results" / "top9").iterdir()}
    assert all(after[name] == before[name] for name in finished if calls.count(name.split(".")[0]) == 2)
    assert not (run / "unfinished" / "top9").exists()


def test_what_a_crash_left_of_finished_work_is_cleared(make_run, make_shards, monkeypatch):
    data, run = make_shards(val=[5]), make_run()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "clear_finished", lambda context, analysis: None)
        run_top9(run, data)
    assert list((run / "unfinished" / "top9").iterdir())
    assert run_top9(run, data) == 0
    assert not (run / "unfinished" / "top9").exists()


@pytest.mark.parametrize("name", ["../escaped", "a/b", "", ".hidden"])
def test_a_name_cannot_leave_the_results(name):
    with pytest.raises(RunError, match="letters, digits"):
        Options(name=name)


def test_torch_is_left_as_it_was(make_run, make_shards):
    torch.set_num_threads(2)
    try:
        run_top9(make_run(), make_shards(val=[3]))
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(1)


def test_a_node_that_does_not_see_the_run_says_so(make_run, make_shards, monkeypatch):
    from pipeline.work import Work

    data, run = make_shards(val=[3]), make_run()
    monkeypatch.setattr(Work, "prepare", lambda self: None)
    with pytest.raises(SweepFailed, match=r"does not see .+work.json.+storage that all nodes share"):
        run_top9(run, data)
