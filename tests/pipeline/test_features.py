"""The features table: what hooks on the network see, bit for bit; and what is refused."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import sweep
from pipeline.analyses import features
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.indexing import index_shards
from pipeline.runs import Run, RunError
from pipeline.shards import Index
from pipeline.work import Cut
from tests.conftest import CLASSES, samples
from tests.pipeline.exact import assert_same
from tests.tars import write_tar
from zfnet import images

LAYERS = {"conv1": "relu1", "conv5": "relu5", "pool5": "pool5", "fc6": "relu6"}
CUT = {"part_size": 8, "batch_size": 3}
POOLED = {
    "mean": lambda x: x.mean(-1),
    "max": lambda x: x.amax(-1),
    "flat": lambda x: x.flatten(1),
}


def run_features(run, data, *, split="val", num=0, name=None, **config):
    options = Options(run=str(run), data=str(data), split=split, name=name, workers=Workers(num=num, cpus=2))
    return sweep.run(features.ANALYSIS, options, features.Config(**{**CUT, "layers": tuple(LAYERS), **config}))


def by_definition(run, data, split, pool):
    """Layer -> key -> vector, from torch's own forward with hooks, in the same batches."""
    model, index = Run.at(str(run)).load_model(), Index.load(str(data))
    seen, found = {}, {layer: {} for layer in LAYERS}
    for layer, child in LAYERS.items():
        note = partial(lambda layer, module, args, output: seen.update({layer: output.clone()}), layer)
        model.network.get_submodule(child).register_forward_hook(note)
    for part in Cut(index.split(split), CUT["part_size"]):
        for start in range(0, part.num_rows, CUT["batch_size"]):
            some = list(index.read(part.slice(start, CUT["batch_size"])))
            size = model.preprocessing.resize_px, model.preprocessing.crop_px
            pixels = np.stack([images.centre_crop(images.decode(s.image), *size)[0] for s in some])
            with torch.no_grad():
                model.network(model.preprocessing.normalise(torch.from_numpy(pixels)))
            for layer in LAYERS:
                pooled = POOLED[pool](seen[layer].reshape(*seen[layer].shape[:2], -1))
                found[layer].update({s.key: vector.numpy() for s, vector in zip(some, pooled, strict=True)})
    return found


@pytest.mark.parametrize("pool", POOLED)
def test_features_are_what_hooks_see_bit_for_bit(make_run, make_shards, pool):
    data, run = make_shards(train=[5], val=[13, 9]), make_run()
    for split in ("train", "val"):
        assert run_features(run, data, split=split, pool=pool) == 0
        expected = by_definition(run, data, split, pool)
        keys = Index.load(str(data)).split(split)["key"].to_pylist()
        for layer in LAYERS:
            frame = pq.read_table(run / "results" / "features" / f"{layer}-{split}.parquet").to_pandas()
            assert frame.key.tolist() == keys
            assert set(frame.split) == {split}
            assert set(frame.pool) == {pool}
            for row in frame.itertuples():
                assert row.features.tobytes() == expected[layer][row.key].tobytes(), (layer, row.key)
            if pool == "flat":
                assert (frame.features.map(len) == frame.maps * frame.map_height * frame.map_width).all()
    frame = pd.read_parquet(run / "results" / "features")
    assert len(frame) == len(LAYERS) * 27
    assert frame.groupby("layer").maps.first().to_dict() == {"conv1": 32, "conv5": 64, "pool5": 64, "fc6": 512}
    assert (frame.label_name == frame.label.map(dict(enumerate(CLASSES)))).all()
    assert frame.box_labels.isna().all()


def test_workers_and_how_much_is_gathered_change_nothing(make_run, make_shards, ray_cluster, monkeypatch):
    data, run, other = make_shards(val=[20, 13]), make_run(), make_run("other")
    run_features(run, data)
    monkeypatch.setattr("pipeline.tables.ROW_GROUP_BYTES", 4000)
    run_features(other, data, num=2)
    assert_same(run, other, "features")
    file = pq.ParquetFile(other / "results" / "features" / "fc6-val.parquet")
    assert file.num_row_groups > pq.ParquetFile(run / "results" / "features" / "fc6-val.parquet").num_row_groups


def test_more_layers_and_splits_only_add_files(make_run, make_shards):
    data, run = make_shards(train=[4], val=[5]), make_run()
    run_features(run, data, layers=("conv5",))
    path = run / "results" / "features" / "conv5-val.parquet"
    before = path.stat().st_mtime_ns
    run_features(run, data, layers=("conv5", "fc6"), max_gb=1.0)
    run_features(run, data, layers=("conv5",), split="train")
    assert path.stat().st_mtime_ns == before
    assert sorted(p.stem for p in path.parent.iterdir()) == ["conv5-train", "conv5-val", "fc6-val"]
    with pytest.raises(RunError, match=r"pool: finished with 'mean', asked 'max'.+--name"):
        run_features(run, data, layers=("conv5",), pool="max")


def test_the_default_is_every_convolution_and_linear_layer(make_run, make_shards):
    data, run = make_shards(val=[2]), make_run()
    run_features(run, data, layers=())
    names = {f"conv{i}-val" for i in range(1, 6)} | {f"fc{i}-val" for i in (6, 7, 8)}
    assert {p.stem for p in (run / "results" / "features").iterdir()} == names


def test_classes_of_boxes_are_kept_and_damaged_json_is_not(make_run, tmp_path):
    boxes = [
        {"boxes": [{"label": "green", "xyxy": [0, 0, 4, 4]}, {"label": "blue"}, {"label": "green"}]},
        {"boxes": [{"label": "red", "xyxy": [4, 4, 4, 9]}, {"xyxy": [0, 0, 4, 4]}, "green"]},
        {"boxes": []},
        {"width": 3},
    ]
    texts = [*(json.dumps(found).encode() for found in boxes), b"{", b"[1]"]
    data = tmp_path / "data"
    data.mkdir()
    drawn = samples(len(texts))
    write_tar(data / "val-0.tar", [(k, m | {"json": text}) for (k, m), text in zip(drawn, texts, strict=True)])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run = make_run()
    run_features(run, data, layers=("conv5",))
    found = pq.read_table(run / "results" / "features")["box_labels"].to_pylist()
    assert found == [["blue", "green"], ["red"], None, None, None, None]  # a box without an area names a class, too


def test_features_that_would_take_too_much_are_refused_before_work(make_run, make_shards):
    data, run = make_shards(val=[5]), make_run()
    takes = 4 * 5 * 64 * (1 + 512 / 64) / 1e9  # conv5 by mean, fc6
    with pytest.raises(RunError, match=r"5 images would take .+ GB .+: give fewer --layers, or a larger --max-gb"):
        run_features(run, data, layers=("conv5", "fc6"), max_gb=takes * 0.99)
    with pytest.raises(RunError, match=r"--pool mean or max \(.+ GB\), fewer --layers"):
        run_features(run, data, layers=("conv5", "fc6"), max_gb=takes, pool="flat")
    assert not (run / "unfinished").exists()
    assert run_features(run, data, layers=("conv5", "fc6"), max_gb=takes * 1.01) == 0


def test_an_activation_that_is_not_finite_names_the_sample(make_run, make_shards):
    data, run = make_shards(val=[4]), make_run()
    model = Run.at(str(run)).load_model()
    with torch.no_grad():
        model.network.conv5.bias[3] = torch.nan
    Run.at(str(run)).save_model(
        model.network, architecture="zfnet_small", classes=CLASSES, preprocessing=model.preprocessing, about={}
    )
    with pytest.raises(SweepFailed, match="'s0-0000': feature map 3 of image 0 of the batch is NaN"):
        run_features(run, data, layers=("conv5",))


@pytest.mark.parametrize("config", [{"max_gb": 0.0}, {"part_size": 0}, {"batch_size": 0}])
def test_what_features_cannot_be_is_refused(config):
    with pytest.raises(RunError, match=f"--{next(iter(config)).replace('_', '-')} is 0"):
        features.Config(**config)
