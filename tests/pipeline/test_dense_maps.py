"""Class maps and features at OverFeat's scales: what the network gives for each image by itself, and where it lies."""

import io
import shutil

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline import sweep
from pipeline.analyses import dense_maps, evaluation, features
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.runs import Run, RunError
from pipeline.shards import Index
from tests.conftest import CLASSES, ROOT
from tests.pipeline.exact import assert_same
from tests.pipeline.overfeat import SIZES, overfeat_run, photos
from zfnet.dense import Sliding
from zfnet.images import decode, resize


def table(run, name):
    return pd.read_parquet(run / "results" / name)


@pytest.fixture
def data(tmp_path):
    return photos(tmp_path / "data")


def run_job(analysis, run, data, config, *, num=0, name=None, max_skipped=0.01):
    options = Options(
        run=str(run), data=str(data), name=name, max_skipped=max_skipped, workers=Workers(num=num, cpus=1)
    )
    return sweep.run(analysis.ANALYSIS, options, analysis.Config(**{"part_size": 4, "batch_size": 3, **config}))


def seen(run, data, scale):
    """Each image, what the network sees of it at a scale, and the network."""
    model, index = Run.at(str(run)).load_model(), Index.load(str(data))
    sliding, preprocessing = Sliding(model.network), model.preprocessing.of_any_size()
    for sample in index.read(index.split("val")):
        image = decode(sample.image)
        resized = resize(image, sliding.sides_px(scale)[0])
        pixels, crop = sliding.view(resized, image.size, scale)
        yield sample, image, pixels, crop, preprocessing.normalise(torch.from_numpy(pixels.copy())[None]), sliding


# ---------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("stride", ["fine", "coarse"])
@torch.no_grad()
def test_a_map_is_the_softmax_of_every_window_of_the_image(tmp_path, data, stride):
    run = overfeat_run(tmp_path / "run", "overfeat_accurate_small")
    config = {"scales": (3, 1), "stride": stride, "classes": 2}
    assert run_job(dense_maps, run, data, config) == 0
    assert run_job(evaluation, run, data, {"views": "overfeat", "scales": (1, 3), "stride": stride}) == 0
    rows, predictions = table(run, "dense_maps"), table(run, "predictions").set_index("key")
    assert len(rows) >= 2 * 2 * len(SIZES)
    for scale in (1, 3):
        for sample, image, pixels, _, x, sliding in seen(run, data, scale):
            some = rows[(rows.key == sample.key) & (rows.scale == scale)]
            maps = sliding.scores(sliding.pooled(x, stride))[0].double().softmax(0)
            best = predictions.loc[sample.key]
            assert some["class"].tolist()[:2] == best.top5_classes.tolist()[:2]
            assert set(some["class"]) == {*best.top5_classes[:2], sample.label}
            for row in some.itertuples():
                found = row.probability_map.reshape(row.map_height, row.map_width)
                np.testing.assert_allclose(found, maps[row._10], rtol=1e-4, atol=1e-6)
                assert (row.class_name, row.rank) == (CLASSES[row._10], best.top5_classes.tolist().index(row._10) + 1)
                assert row.probability == pytest.approx(best.top5_probabilities[row.rank - 1], rel=1e-5)
                if row.rank > 1:
                    assert row.image_png is None
                else:
                    assert np.array_equal(np.asarray(Image.open(io.BytesIO(row.image_png))), pixels)
            assert_windows_are_centred(row, image, sliding, stride, min(image.size) / sliding.sides_px(scale)[0])


def assert_windows_are_centred(row, image, sliding, stride, factor):
    """The windows lie side by side, and all of them in the middle of the original, to which `factor` leads."""
    assert (row.box_height, row.box_width) == pytest.approx((70 * factor, 70 * factor), rel=0.02)
    assert row.step_width / row.box_width == pytest.approx(sliding.step_px[stride] / 70)
    assert row.step_height / row.box_height == pytest.approx(sliding.step_px[stride] / 70)
    beyond = 0 if stride == "fine" else (sliding.cells - 1) * sliding.step_px["fine"] * factor
    bottom = row.box_top + row.step_height * (row.map_height - 1) + row.box_height + beyond
    right = row.box_left + row.step_width * (row.map_width - 1) + row.box_width + beyond
    assert row.box_top + bottom == pytest.approx(image.height, abs=1.1 * factor)
    assert row.box_left + right == pytest.approx(image.width, abs=1.1 * factor)


def test_images_are_chosen_and_workers_change_no_bit(tmp_path, data, ray_cluster):
    run = overfeat_run(tmp_path / "run")
    again = shutil.copytree(run, tmp_path / "again")
    assert run_job(dense_maps, run, data, {"scales": (2,)}) == 0
    assert run_job(dense_maps, again, data, {"scales": (2,)}, num=2) == 0
    assert_same(run, again, "dense_maps")
    assert run_job(dense_maps, run, data, {"keys": ("k5", "k1"), "scales": (2,)}, name="two") == 0
    assert table(run, "dense_maps-two").key.unique().tolist() == ["k1", "k5"]
    assert run_job(dense_maps, run, data, {"label": "green", "first": 1, "scales": (2,)}, name="green") == 0
    assert table(run, "dense_maps-green").key.unique().tolist() == ["k1"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"keys": ("nobody",)}, "there is no key 'nobody' in the split 'val'"),
        ({"label": "pink"}, "there is no class 'pink'"),
        ({"label": "red", "keys": ("k1",)}, "choose images by one of them"),
        ({"scales": (0,)}, "--scales has 0: give some of 1 to 6"),
        ({"classes": 0}, "--classes is 0"),
    ],
)
def test_choices_that_cannot_be_are_refused(tmp_path, data, config, message):
    with pytest.raises(RunError, match=message):
        run_job(dense_maps, overfeat_run(tmp_path / "run"), data, config)


def test_networks_that_do_not_slide_have_no_maps(make_run, data):
    with pytest.raises(RunError, match="zfnet_small takes images of one size"):
        run_job(dense_maps, make_run(), data, {})
    with pytest.raises(RunError, match="zfnet_small takes images of one size"):
        run_job(features, make_run(), data, {"scale": 1})


def test_the_docs_name_every_column():
    text = (ROOT / "docs" / "overfeat.md").read_text()
    assert [name for name in dense_maps.SCHEMA.names if f"`{name}`" not in text] == []


# ------------------------------------------------------------------------------------------------------------ features

LAYERS = {"conv1": "relu1", "conv6": "relu6", "pool6": "pool6", "fc7": "relu7", "fc9": "fc9"}


@pytest.mark.parametrize(("pool", "stride"), [("mean", "fine"), ("max", "coarse"), ("flat", "fine")])
@torch.no_grad()
def test_features_at_a_scale_are_those_of_each_image_by_itself(tmp_path, data, pool, stride):
    run = overfeat_run(tmp_path / "run", "overfeat_accurate_small")
    config = {"layers": tuple(LAYERS), "pool": pool, "scale": 3, "stride": stride}
    assert run_job(features, run, data, config) == 0
    for layer, node in LAYERS.items():
        rows = pq.read_table(run / "results" / "features" / f"{layer}-val.parquet").to_pandas()
        assert rows.key.tolist() == [f"k{i}" for i in range(len(SIZES))]
        for (_, _, _, _, x, sliding), row in zip(seen(run, data, 3), rows.itertuples(), strict=True):
            maps = sliding.activations(x, [node], stride)[node][0]
            expected = {"mean": maps.mean((1, 2)), "max": maps.amax((1, 2)), "flat": maps.flatten()}[pool]
            scale = float(maps.abs().max())
            np.testing.assert_allclose(row.features, expected, rtol=0, atol=1e-5 * scale)
            assert (row.maps, row.map_height, row.map_width) == tuple(maps.shape)
            assert (row.scale, row.stride, row.pool) == (3, stride, pool)
    assert len(set(zip(rows.map_height, rows.map_width, strict=True))) == 4  # square, upright, wide, wider
    with pytest.raises(RunError, match=r"scale: finished with 3, asked 2.+--name"):
        run_job(features, run, data, {**config, "scale": 2})
    assert run_job(features, run, data, {**config, "scale": 2}, name="second") == 0


def test_features_of_the_centre_crop_have_no_scale(tmp_path, data):
    run = overfeat_run(tmp_path / "run")
    assert run_job(features, run, data, {"layers": ("fc6",)}) == 0
    rows = pd.read_parquet(run / "results" / "features")
    assert rows.scale.isna().all()
    assert rows.stride.isna().all()


def test_what_is_forecast_counts_the_scales_largest_images(tmp_path, data):
    run = overfeat_run(tmp_path / "run")
    config = {"layers": ("fc6",), "pool": "flat", "scale": 6}
    with pytest.raises(RunError, match=r"--pool mean or max \(1\.08e-05 GB\), fewer --layers"):
        run_job(features, run, data, {**config, "max_gb": 4 * 7 * 384 * 14 * 19 / 1e9})
    with pytest.raises(RunError, match="--layers: maximum cannot be had of larger images"):
        run_job(features, run, data, {"layers": ("maximum",), "scale": 1})
    with pytest.raises(RunError, match="--scales has 7"):
        features.Config(scale=7)
    with pytest.raises(RunError, match="--stride goes with --scale"):
        features.Config(stride="coarse")


def test_activations_that_are_not_finite_name_the_key(tmp_path, data):
    run = overfeat_run(tmp_path / "run")
    model = Run.at(str(run)).load_model()
    model.network.fc6.bias.data[4] = float("inf")
    Run.at(str(run)).save_model(
        model.network, architecture=model.architecture, classes=CLASSES, preprocessing=model.preprocessing, about={}
    )
    with pytest.raises(SweepFailed, match=r"sample 'k0': feature map 4 .+ is NaN or infinite"):
        run_job(features, run, data, {"layers": ("fc6",), "scale": 1})
