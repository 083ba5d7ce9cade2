"""Figures: what they show is what the tables hold; what is missing is named; the same tables give the same bytes."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipeline import fills, sweep, tables
from pipeline.analyses import (
    ablation,
    correspondence,
    deconv,
    evaluation,
    invariance,
    multilabel,
    occlusion,
    scratch,
    top9,
    transfer,
)
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.drawing.tiles import image_of
from pipeline.figures import book, filters, markdown, masks, sheet, source, tiles
from pipeline.figures import evolution as evolution_figure
from pipeline.figures import invariance as invariance_figure
from pipeline.figures import occlusion as occlusion_figure
from pipeline.figures import top9 as top9_figure
from pipeline.figures import transfer as transfer_figure
from pipeline.indexing import index_shards
from pipeline.papers import numbers
from pipeline.runs import Run, RunError
from tests.conftest import random_model, samples
from tests.tars import write_tar
from zfnet.images import Preprocessing

HOSTILE = "$x_{ & 🦊 \u202e\u05e9\u05dc"
CLASSES = ("red", HOSTILE, "blue")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the tables of figures 2, 5, 6 and 7, as the jobs write them."""
    folder = tmp_path_factory.mktemp("figures")
    write_tar(folder / "val-0.tar", samples(14))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(folder / "val-0.tar")], str(folder), classes=None, accept_damaged=False)
    made = Run.at(str(folder / "run"))
    preprocessing = Preprocessing(resize_px=72, crop_px=64, mean=torch.full((3, 1, 1), 120.0))
    made.save_model(random_model(), architecture="zfnet_small", classes=CLASSES, preprocessing=preprocessing, about={})
    options = Options(run=str(made.location), data=str(folder), workers=Workers(num=0))
    layers = ("conv1", "conv2")
    for analysis, config in (
        (top9.ANALYSIS, top9.Config(layers=layers)),
        (deconv.ANALYSIS, deconv.Config(layers=layers)),
        (occlusion.ANALYSIS, occlusion.Config(first=2, stride_px=16)),
        (
            invariance.ANALYSIS,
            invariance.Config(first=2, layers=("conv1", "fc7"), rotations_deg=(0, 90), scales=(1, 1.5)),
        ),
        (evaluation.ANALYSIS, evaluation.Config()),
    ):
        assert sweep.run(analysis, options, config) == 0
    return made


def finish(run, table, slice_, schema, columns):
    length = len(next(iter(columns.values())))
    filled = {field.name: columns.get(field.name, [_plain(field)] * length) for field in schema}
    rows = tables.conform(filled, schema)
    tables.write(rows, run.slice(table, slice_))
    run.finish(table, slice_, {"rows": length}, run.location / "staging")


def _plain(field):
    """Some value of the column's type."""
    text = str(field.type)
    if text.startswith("list"):
        return []
    return {"string": "s", "bool": True, "binary": b""}.get(text, 1)


def shown(run, images=5, against=None):
    return source.Source(run, against, images, seed=0)


def frame(run, table):
    return pd.read_parquet(f"{run.location}/results/{table}")


def test_figure_2_shows_each_maps_nine_projections_and_patches(run):
    drawn = dict(top9_figure.draw(shown(run)))
    assert list(drawn) == ["figure2_conv1", "figure2_conv2"]
    projections, patches = (axis.images[0].get_array() for axis in drawn["figure2_conv2"].axes)
    maps = [int(text.get_text()) for text in drawn["figure2_conv2"].axes[0].texts]
    table = frame(run, "deconv").query("layer == 'conv2'")
    assert len(maps) == 16
    assert set(maps) <= set(table.feature_map)
    step = 3 * 48 + 2 * 2 + 14
    for place, number in enumerate(maps):
        nine = table[table.feature_map == number].sort_values("rank").to_dict("records")
        for rank, row in enumerate(nine):
            top, left = step * (place // 4) + 50 * (rank // 3), step * (place % 4) + 50 * (rank % 3)
            for sheet_, tile in ((projections, tiles.projection_tile), (patches, tiles.patch_tile)):
                expected = sheet.on_white(tile(row, 64, 48))
                np.testing.assert_array_equal(sheet_[top : top + 48, left : left + 48], expected)


def test_figure_5_has_a_line_for_each_image_in_each_panel(run):
    ((_, figure),) = invariance_figure.draw(shown(run))
    table = frame(run, "invariance")
    panels = [axis for axis in figure.axes if axis.lines]
    assert len(panels) == 3 * table["transform"].nunique()
    for axis in panels:
        assert len(axis.lines) == 2
    first = table[(table.layer == "fc7") & (table["transform"] == "vertical")].sort_values("amount")
    for line, key in zip(panels[1].lines, table.key.unique(), strict=True):
        rows = first[first.key == key]
        np.testing.assert_array_equal(line.get_xdata(), rows.amount)
        np.testing.assert_array_equal(line.get_ydata(), rows.distance)


def test_figure_6_puts_two_runs_side_by_side(run):
    ((_, alone),) = filters.draw(shown(run))
    ((_, both),) = filters.draw(shown(run, against=run))
    assert (len(alone.axes), len(both.axes)) == (2, 4)
    weights = run.load_model().network.conv1.weight.detach().permute(0, 2, 3, 1).numpy()
    pixels = alone.axes[0].images[0].get_array()
    large = 32 // 7
    first = np.rint(255 * (weights[0] / (2 * np.abs(weights).max()) + 0.5))
    np.testing.assert_array_equal(pixels[: 7 * large : large, : 7 * large : large], first)


def test_figure_6_says_so_where_deconv_has_none_of_the_second_layer(run, tmp_path):
    other = Run.at(str(tmp_path / "other"))
    shutil.copytree(run.location.path, other.location.path)
    for place in ("results/manifests/deconv", "results/deconv"):
        shutil.rmtree(tmp_path / "other" / place)
    with pytest.raises(source.Missing, match="there is no table deconv: python jobs/deconv.py --run .*other --data SH"):
        next(filters.draw(shown(other)))
    given = Options(run=str(other.location), data=str(run.location.path.rpartition("/")[0]), workers=Workers(num=0))
    sweep.run(top9.ANALYSIS, replace(given, name="third"), top9.Config(layers=("conv3",)))
    sweep.run(deconv.ANALYSIS, given, deconv.Config(top9="top9-third", layers=("conv3",)))
    ((_, figure),) = filters.draw(shown(other))
    titles = [" ".join(axis.get_title().split()) for axis in figure.axes]
    assert titles == [
        "zfnet_small: filters of conv1",
        "zfnet_small: projections of conv3, as deconv has none of conv2",
    ]


@pytest.mark.parametrize("fill", ["9", "255,0,7", "mean", "blur"])
def test_a_part_is_hidden_as_the_network_saw_it(run, fill):
    pixels = image_of(frame(run, "occlusion").iloc[0].to_dict())
    drawn = fills.Hider(run).hidden(pixels, fill, (-3, 40, 13, 13))
    expected = pixels.copy()
    inside = expected[:10, 40:53]  # cut to the image
    if fill == "blur":
        sigma = 10 / 224 * 64
        whole = [gaussian_filter(pixels[..., c].astype(float), sigma, mode="nearest", truncate=3) for c in range(3)]
        inside[:] = np.rint(np.stack(whole, -1))[:10, 40:53]
    else:
        inside[:] = {"9": 9, "255,0,7": [255, 0, 7], "mean": 120}[fill]
    assert np.abs(drawn.astype(int) - expected).max() <= (fill == "blur")  # the edge of three sigma


def test_the_mean_that_hides_parts_is_read_once(run, monkeypatch):
    loaded, load = [], Run.load_model
    monkeypatch.setattr(Run, "load_model", lambda self: loaded.append(1) or load(self))
    pixels = image_of(frame(run, "occlusion").iloc[0].to_dict())
    hider = fills.Hider(run)
    hider.hidden(pixels, "blur", (0, 0, 9, 9))
    assert not loaded
    for top in range(3):
        hider.hidden(pixels, "mean", (top, 0, 9, 9))
    assert len(loaded) == 1


def test_figure_7_shows_the_three_maps_of_each_image(run):
    ((_, figure),) = occlusion_figure.draw(shown(run, images=1))
    row = frame(run, "occlusion").iloc[0]
    grid = (row.grid_rows, row.grid_cols)
    image, activation, projections, probability, _ = (axis.images[0].get_array() for axis in figure.axes[:5])
    np.testing.assert_array_equal(activation, row.activation_map.reshape(grid))
    np.testing.assert_array_equal(probability, row.probability_map.reshape(grid))
    whole = image_of(row.to_dict())
    hidden = (image != whole).any(-1)
    assert 0 < hidden.sum() <= row.occluder_px * row.occluder_width_px
    assert (image[hidden] == 124).all()  # the default of --fill
    two = 2 * 64 + 4
    assert projections.shape in {(64, 64, 3), (64, two, 3), (two, two, 3)}


def test_figures_of_tables_that_other_data_gives(run, tmp_path):
    other = Run.at(str(tmp_path / "other"))
    png = frame(run, "occlusion").image_png.iloc[0]
    finish(other, "correspondence_images", "images", correspondence.IMAGES, {
        "key": ["a"], "parts": [["eye", "random"]], "mask_tops": [[4, 30]], "mask_lefts": [[8, -3]], "mask_px": [10],
        "image_png": [png],
    })  # fmt: skip
    finish(other, "correspondence", "conv5", correspondence.CORRESPONDENCE, {
        "layer": ["conv5"] * 2, "part": ["eye", "random"], "mean": [0.25, 0.5], "std_pairs": [0.125, 0.0625],
        "fill": ["255,0,7"] * 2,
    })  # fmt: skip
    finish(other, "transfer", "conv5", transfer.SCHEMA, {
        "layer": ["conv5"] * 3, "classifier": ["svm"] * 3, "images_per_class": [30, 5, 1],
        "accuracy": [0.75, 0.5, 0.25], "spread": [0.01, 0.02, None],
    })  # fmt: skip
    ((_, figure),) = masks.draw(shown(other))
    original, eye, random = (axis.images[0].get_array() for axis in figure.axes)
    assert (eye[4:14, 8:18] == [255, 0, 7]).all()
    assert (random[30:40, :7] == [255, 0, 7]).all()
    np.testing.assert_array_equal(random[:, 7:], original[:, 7:])
    ((_, figure),) = transfer_figure.draw(shown(other, against=other))
    points = figure.axes[0].containers[0].lines[0]
    np.testing.assert_array_equal(points.get_xdata(), [1, 5, 30])
    np.testing.assert_array_equal(points.get_ydata(), [25, 50, 75])
    assert len(figure.axes[0].containers) == 2  # the run and the one it is set against
    finish(other, "scratch", "30", scratch.SCHEMA, {
        "architecture": ["zfnet_small"] * 2, "images_per_class": [30, 5],
        "accuracy": [0.5, 0.125], "spread": [0.02, None],
    })  # fmt: skip
    ((_, figure),) = transfer_figure.draw(shown(other))
    _, anew = figure.axes[0].containers
    assert anew.get_label() == "zfnet_small, from scratch"
    np.testing.assert_array_equal(anew.lines[0].get_xydata(), [[5, 12.5], [30, 50]])
    finish(other, "ablation", "zfnet", ablation.SCHEMA, {
        "variant": ["zfnet", "zfnet_no7"], "change": ["as it is", "layer 7 removed"], "compared_with": [None, "zfnet"],
        "train_top1_error": [0.3, 0.5], "top1_error": [0.4, 0.5], "top5_error": [0.2, 0.25],
    })  # fmt: skip
    for layer, values in {"conv5": [0.5, None], "fc7": [0.75, 0.25]}.items():
        finish(other, "multilabel", layer, multilabel.SCHEMA, {
            "layer": [layer] * 2, "label_name": ["cat", "dog"], "average_precision": values,
        })  # fmt: skip
    text, missing = markdown.write(shown(other))
    assert "| class | conv5 | fc7 |\n" in text
    assert "| this run, cat | 50.0 | 75.0 |\n| this run, dog | – | 25.0 |\n| this run, mean | 50.0 | 50.0 |\n\n" in text
    assert "| this run, zfnet: as it is | 30.0 | 40.0 | 20.0 |\n" in text
    assert "| this run, zfnet_no7: layer 7 removed | 50.0 | 50.0 | 25.0 |\n| alexnet: as it is | 35.1 | 40.5" in text
    assert "| this run, zfnet_no7: layer 7 removed | 10.0 | 5.0 |\n| no contrast normalisation | 1.4 | 1.2 |" in text
    assert "| colours not shifted: more than 1 % | 1.0 | – |" in text
    assert "| this run, eye | 0.250 +- 0.125 |" in text
    assert "| classifier | 1 | 5 | 30 |\n" in text
    assert "| this run, svm (conv5) | 25.0 | 50.0 +- 2.0 | 75.0 +- 1.0 |" in text
    assert "| this run, not pretrained (zfnet_small) | – | 12.5 | 50.0 +- 2.0 |" in text
    assert "| Caltech-101, not pretrained | 22.8 +- 1.5 | 46.5 +- 1.7 |" in text
    assert "| Caltech-256, not pretrained | 9.0 +- 1.4 | 22.5 +- 0.7 | 31.2 +- 0.5 | 38.8 +- 1.4 |" in text
    assert all(" | ".join(line) in text for line in numbers.CORRESPONDENCE)
    assert [line.split(":")[0] for line in missing] == ["Table 2", "OverFeat, figure 9", "OverFeat, figure 11"]


def test_figure_4_has_a_row_for_each_map_and_a_column_for_each_epoch(run, tmp_path):
    rows = frame(run, "deconv").query("layer == 'conv2' and rank == 1").head(3)
    columns = ["layer", "feature_map", *tiles.PLACE, *tiles.PROJECTION]
    schema = deconv.schema(deconv.Config(values="float32"))
    schema = pa.schema([pa.field("epoch", pa.int32()), *(schema.field(name) for name in columns)])
    twice = pd.concat([rows.assign(epoch=1), rows.assign(epoch=5).head(2)])
    other = Run.at(str(tmp_path / "other"))
    (other.location / "run.json").write((run.location / "run.json").read())
    finish(other, "evolution", "conv2", schema, {name: list(twice[name]) for name in schema.names})
    ((_, figure),) = evolution_figure.draw(shown(other))
    pixels = figure.axes[0].images[0].get_array()
    assert pixels.shape[:2] == (3 * 66 - 2, 2 * 66 - 2)
    first = sheet.on_white(tiles.projection_tile(rows.iloc[0].to_dict(), 64, 64))
    np.testing.assert_array_equal(pixels[:64, :64], first)
    np.testing.assert_array_equal(pixels[:64, 66:], first)
    assert (pixels[2 * 66 :, 66:] == sheet.WHITE).all()  # not shown in the later epoch
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "5"]


def test_all_of_it_is_written_and_the_same_tables_give_the_same_bytes(run, tmp_path, capsys):
    options = book.Options(run=str(run.location), out=str(tmp_path / "one"), images=2)
    book.draw(options)
    said = capsys.readouterr().out
    assert "no figure 4: there is no table evolution: python jobs/evolution.py --run" in said
    assert "no figure 8: there is no table correspondence_images: python jobs/correspondence.py --run" in said
    names = {path.name for path in (tmp_path / "one").iterdir()}
    stems = {"figure2_conv1", "figure2_conv2", "figure5", "figure6", "figure7"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")} | {"tables.md"}
    assert all(Image.open(tmp_path / "one" / f"{stem}.png").width > 300 for stem in stems)
    assert "this run, val, centre crop, 14 images | " in (tmp_path / "one" / "tables.md").read_text()
    book.draw(replace(options, out=str(tmp_path / "two")))
    assert all((tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names)


def test_a_run_without_tables_is_refused(make_run, tmp_path):
    with pytest.raises(RunError, match="none of the tables that figures are drawn from"):
        book.draw(book.Options(run=str(make_run())))
    with pytest.raises(RunError, match="none of the tables that figures are drawn from"):
        book.draw(book.Options(run=str(tmp_path / "nothing")))  # jobs/ablation.py's folder has no model either
    with pytest.raises(RunError, match="--images is 0"):
        book.Options(images=0)


def test_the_maps_shown_depend_on_the_seed_alone(run):
    numbers = list(range(40))
    first = shown(run).chosen(numbers, 9)
    assert first == shown(run).chosen(reversed(numbers), 9) == sorted(first)
    assert first != source.Source(run, None, 5, seed=1).chosen(numbers, 9)
    assert shown(run).chosen([3, 1, 3], 9) == [1, 3]
