"""The occlusion table: what the occluder shows, and the rows of every size, against images occluded one by one."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline import sweep
from pipeline.analyses import occlusion
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import Run, RunError


def occluded(run, data, **config):
    options = Options(run=str(run), data=str(data), workers=Workers(num=0, cpus=2))
    assert sweep.run(occlusion.ANALYSIS, options, occlusion.Config(first=2, stride_px=20, **config)) == 0
    return pd.read_parquet(run / "results" / "occlusion")


def by_definition(run, row, shown):
    """Fig. 7 (b): the sum of the strongest map, pixels replaced before preprocessing, one image at a time."""
    model = Run.at(str(run)).load_model()
    seen = []
    model.network.get_submodule("relu5").register_forward_hook(lambda _module, _inputs, y: seen.append(y[0].double()))
    pixels = np.asarray(Image.open(io.BytesIO(row.image_png))).astype(np.float32)
    found = np.zeros((row.grid_rows, row.grid_cols))
    for i in range(row.grid_rows):
        for j in range(row.grid_cols):
            top, left = i * row.stride_px, j * row.stride_px
            under = (slice(top, top + row.occluder_px), slice(left, left + row.occluder_width_px))
            image = pixels.copy()
            image[under] = shown(pixels)[under]
            with torch.no_grad():
                model.network(model.preprocessing.normalise(torch.from_numpy(image)[None]))
            found[i, j] = seen[-1][row.feature_map].sum()
    return found.ravel()


def gaussian(pixels):
    """scipy's, cut off at three sigma, the border continued by its own pixels."""
    sigma = 10 * 64 / 224
    return gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest", radius=(round(3 * sigma),) * 2 + (0,))


FILLS = {
    "124": lambda pixels: np.full_like(pixels, 124),
    "255,0,10": lambda pixels: np.broadcast_to(np.float32([255, 0, 10]), pixels.shape),
    "mean": lambda pixels: np.full_like(pixels, 120),  # of the fixture's preprocessing
    "blur": gaussian,
}


@pytest.mark.parametrize("fill", FILLS)
def test_every_size_has_its_rows_and_shows_the_fill(make_run, make_shards, fill):
    run = make_run()
    frame = occluded(run, make_shards(val=[3]), fill=fill, occluder_px=("24", "16x40"))
    assert frame.key.tolist() == ["s0-0000", "s0-0000", "s0-0001", "s0-0001"]
    assert frame.occluder_px.tolist() == [24, 16] * 2
    assert frame.occluder_width_px.tolist() == [24, 40] * 2
    assert list(zip(frame.grid_rows, frame.grid_cols, strict=True)) == [(3, 3), (3, 2)] * 2
    assert set(frame.fill) == {fill}
    assert frame.exact.all()
    assert not frame.dense_from.isin(["", "x"]).any()  # x is the input: windows were worth it
    for row in frame.itertuples():
        reference = by_definition(run, row, FILLS[fill])
        assert np.abs(row.activation_map - reference).max() / reference.max() <= 1e-5


def test_a_clipped_position_is_added(make_run, make_shards):
    run = make_run()
    frame = occluded(run, make_shards(val=[2]), overhang="clip", occluder_px=("24x30",))
    row = next(frame.itertuples())
    assert (row.grid_rows, row.grid_cols) == (3, 3)  # 34 / 20 is rounded up to 2 steps
    reference = by_definition(run, row, FILLS["124"])
    assert np.abs(row.activation_map - reference).max() / reference.max() <= 1e-5


def test_all_probabilities_are_kept_where_they_are_asked_for(make_run, make_shards):
    run, data = make_run(), make_shards(val=[2])
    frame = occluded(run, data, probabilities=True)
    for row in frame.itertuples():
        all_classes = row.probabilities.reshape(row.grid_rows, row.grid_cols, row.probabilities_classes)
        assert np.array_equal(all_classes[..., row.target_class].ravel(), row.probability_map)
        assert np.array_equal(all_classes.argmax(2).ravel(), row.class_map)
        assert np.abs(all_classes.sum(2) - 1).max() < 1e-6


@pytest.mark.parametrize("refine", [1.0, 0.1])
def test_the_five_best_classes_before_and_with_the_square_where_it_hurts_most(make_run, make_shards, refine):
    run = make_run()
    frame = occluded(run, make_shards(val=[2]), refine=refine)
    model = Run.at(str(run)).load_model()
    for row in frame.itertuples():
        pixels = np.asarray(Image.open(io.BytesIO(row.image_png))).astype(np.float32)
        hidden = pixels.copy()
        i, j = divmod(int(row.probability_map.argmin()), row.grid_cols)
        top, left = i * row.stride_px, j * row.stride_px
        hidden[top : top + row.occluder_px, left : left + row.occluder_width_px] = 124
        for name, image in (("clean", pixels), ("lowest", hidden)):
            with torch.no_grad():
                scores = (
                    model.network(model.preprocessing.normalise(torch.from_numpy(image)[None]))[0].softmax(0).numpy()
                )
            classes = getattr(row, f"{name}_top5_classes")
            assert classes.tolist() == np.argsort(-scores, kind="stable")[:5].tolist()
            assert np.abs(getattr(row, f"{name}_top5_probabilities") - scores[classes]).max() < 1e-5


def test_every_size_has_the_same_projection_made_once(make_run, make_shards, monkeypatch):
    project, layers = occlusion.deconv.project, []
    monkeypatch.setattr(
        occlusion.deconv, "project", lambda record, layer, cell: (layers.append(layer), project(record, layer, cell))[1]
    )
    frame = occluded(make_run(), make_shards(val=[2]), occluder_px=("9", "16x8"))
    assert len(frame) == 4
    assert frame.projection.map(bytes).groupby(frame.key).nunique().eq(1).all()
    assert len(layers) == 2


@pytest.mark.parametrize(("refine", "forwards"), [(1.0, 2 * (1 + 16)), (0.3, 2 * (1 + 4 + 5))])
def test_a_plan_counts_what_refinement_leaves_to_compute(make_run, make_shards, capsys, refine, forwards):
    options = Options(run=str(make_run()), data=str(make_shards(val=[2])), plan=True)
    config = occlusion.Config(first=2, occluder_px=("4",), stride_px=20, refine=refine)  # 4 x 4, of which 2 x 2 coarse
    assert sweep.run(occlusion.ANALYSIS, options, config) == 0
    assert f"forwards  {forwards}\n" in capsys.readouterr().out


def test_refined_maps_are_marked(make_run, make_shards):
    assert not occluded(make_run(), make_shards(val=[2]), refine=0.1).exact.any()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"fill": "1,2"}, "--fill is 1,2: give a grey from 0 to 255, a colour as R,G,B, mean or blur"),
        ({"fill": "256"}, "--fill is 256"),
        ({"occluder_px": ("12by4",)}, "--occluder-px is '12by4': give the side of a square"),
        ({"occluder_px": ("12", "12x12")}, "--occluder-px is 12 12x12: give each size once"),
        ({"refine": 1.5}, "--refine is 1.5"),
        ({"memory_mb": 0}, "--memory-mb is 0"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(RunError) as caught:
        occlusion.Config(**config)
    assert words in str(caught.value)
