"""Sweeps, projections, occlusion and sanity checks of an OverFeat run whose images are larger than its windows."""

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import sweep
from pipeline.analyses import deconv, occlusion, sanity, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import Run
from pipeline.shards import Index
from tests.conftest import CLASSES
from tests.pipeline.overfeat import SIZES, overfeat_run, photos
from zfnet import images
from zfnet.images import Preprocessing
from zfnet.receptive import receptive_field
from zfnet.tracing import trace

SIDE = 106
"""Two windows of 70 px and 36 px between them, in each direction."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of images of 106 px, its shards, and all of the jobs' tables."""
    place = tmp_path_factory.mktemp("overfeat")
    data, own = photos(place / "data"), overfeat_run(place / "own", "overfeat_accurate_small")
    model = Run.at(str(own)).load_model()
    larger = Preprocessing(resize_px=110, crop_px=SIDE, mean=torch.full((3, 1, 1), 110.0))
    Run.at(str(place / "run")).save_model(
        model.network, architecture=model.architecture, classes=CLASSES, preprocessing=larger, about={}
    )
    for analysis, config in (
        (top9, {"layers": ("conv6", "fc7", "fc9")}),
        (deconv, {"layers": ("fc9",)}),
        (sanity, {"layers": ("fc9",), "ranks": 2}),
        (occlusion, {"first": 2, "stride_px": 40}),
    ):
        options = Options(run=str(place / "run"), data=str(data), workers=Workers(num=0, cpus=1))
        assert sweep.run(analysis.ANALYSIS, options, analysis.Config(**config)) == 0
    return place / "run", data


def table(run, name):
    return pd.read_parquet(run / "results" / name)


def test_cells_of_fully_connected_layers_are_swept_like_those_of_convolutions(world):
    run, data = world
    model, index = Run.at(str(run)).load_model(), Index.load(str(data))
    seen, found = {}, {}
    for layer, child in {"conv6": "relu6", "fc7": "relu7", "fc9": "fc9"}.items():
        model.network.get_submodule(child).register_forward_hook(lambda _m, _i, y, at=layer: seen.update({at: y[0]}))
    for sample in index.read(index.split("val")):
        pixels, _ = images.centre_crop(images.decode(sample.image), 110, SIDE)
        with torch.no_grad():
            model.network(model.preprocessing.normalise(torch.from_numpy(pixels.copy())[None]))
        found[sample.key] = dict(seen)
    rows = table(run, "top9")
    assert set(rows.layer) == {"conv6", "fc7", "fc9"}
    assert (found["k0"]["fc7"].shape, found["k0"]["fc9"].shape) == ((512, 3, 3), (3, 3, 3))
    within = {layer: 1e-5 * max(float(maps[layer].max()) for maps in found.values()) for layer in seen}
    for row in rows.itertuples():
        maps = found[row.key][row.layer][row.feature_map]
        assert row.activation == pytest.approx(float(maps.max()), rel=0, abs=within[row.layer])
        assert float(maps[row.row, row.col]) == pytest.approx(float(maps.max()), rel=0, abs=within[row.layer])
    entries = rows[rows.layer == "fc9"].groupby("feature_map").key.agg(list)
    for feature_map, keys in entries.items():
        strongest = sorted(found, key=lambda key: -found[key]["fc9"][feature_map].max())
        assert keys == [key for key in strongest if found[key]["fc9"][feature_map].max() > 0]
    assert rows[rows.layer == "fc7"].row.max() == 2
    field = receptive_field(trace(model.network, (3, SIDE, SIDE)), "fc7")
    some = rows[rows.layer == "fc7"].iloc[0]
    assert (some.top, some.left, some.height, some.width) == field.box(some.row, some.col)


def test_their_projections_are_cut_to_the_image_and_their_patches_give_the_activation_again(world):
    run, _ = world
    projections, cells = table(run, "deconv"), table(run, "top9")
    assert len(projections) == (cells.layer == "fc9").sum() > 0
    for row in projections.itertuples():
        assert row.projection_height == min(row.top + row.height, SIDE) - max(row.top, 0)
        assert len(row.projection) == row.projection_height * row.projection_width * 3
        assert np.abs(row.projection).max() > 0
    checked = table(run, "sanity")
    assert set(checked.stage) == set(range(checked.stage.max() + 1))
    assert checked[checked.stage == 0].spearman_absolute.to_numpy() == pytest.approx(1)


def test_occlusion_watches_the_last_convolution(world):
    run, _ = world
    rows = table(run, "occlusion")
    assert (len(rows), set(rows.layer)) == (2, {"conv6"})


def test_the_default_is_every_convolution_and_no_fully_connected_layer(tmp_path):
    run, data = overfeat_run(tmp_path / "run"), photos(tmp_path / "data")
    options = Options(run=str(run), data=str(data), workers=Workers(num=0, cpus=1))
    assert sweep.run(top9.ANALYSIS, options, top9.Config()) == 0
    assert set(table(run, "top9").layer) == {f"conv{i}" for i in range(1, 6)}
    assert table(run, "feature_maps").images.eq(len(SIZES)).all()
