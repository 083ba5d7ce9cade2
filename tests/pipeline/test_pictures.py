"""The table of whole pictures: one for each image that another table names, and its place in the original."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import sweep
from pipeline.analyses import pictures, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import RunError
from zfnet.images import input_pixels


def swept(make_run, make_shards):
    run, data = make_run(), make_shards(val=[4, 3])
    options = Options(run=str(run), data=str(data), workers=Workers(num=0))
    assert sweep.run(top9.ANALYSIS, options, top9.Config(layers=("conv1", "conv5"))) == 0
    return run, data, options


def test_every_image_of_the_cells_has_its_picture_and_its_place(make_run, make_shards):
    run, data, options = swept(make_run, make_shards)
    assert sweep.run(pictures.ANALYSIS, options, pictures.Config(picture_px=48, part_size=3, batch_size=2)) == 0
    frame = pd.read_parquet(run / "results" / "pictures")
    cells = pd.read_parquet(run / "results" / "top9")
    for layer, rows in frame.groupby("slice"):
        assert rows.key.tolist() == sorted(set(cells[cells.layer == layer].key))
    originals = dict(samples_of(data))
    for row in frame.itertuples():
        pixels, crop = input_pixels(originals[row.key], 72, 64)
        shown = Image.open(io.BytesIO(row.picture_jpeg))
        assert shown.size == (row.picture_px, row.picture_px) == (48, 48)
        expected = np.asarray(Image.fromarray(pixels).resize((48, 48)), dtype=float)
        assert np.abs(np.asarray(shown, dtype=float) - expected).mean() < 6  # a JPEG of quality 85
        assert row.input_px == 64
        place = (row.box_top, row.box_left, row.box_height, row.box_width)
        assert place == pytest.approx(crop.to_original(0, 0, 64, 64), rel=1e-6)


def test_whole_images_keep_their_proportions_and_say_their_size(make_run, make_shards):
    run, data, options = swept(make_run, make_shards)
    assert sweep.run(pictures.ANALYSIS, options, pictures.Config(whole=True, picture_px=40, slices=("conv1",))) == 0
    originals = dict(samples_of(data))
    for row in pd.read_parquet(run / "results" / "pictures").itertuples():
        image, shown = Image.open(io.BytesIO(originals[row.key])), Image.open(io.BytesIO(row.picture_jpeg))
        assert (row.box_top, row.box_left, row.box_height, row.box_width) == (0, 0, image.height, image.width)
        assert max(shown.size) == row.picture_px <= 40
        assert shown.width / shown.height == pytest.approx(image.width / image.height, rel=0.05)
        assert np.isnan(row.input_px)


def samples_of(data):
    import tarfile

    for path in sorted(data.glob("val-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".jpg"):
                    yield member.name.removesuffix(".jpg"), tar.extractfile(member).read()


def test_what_names_no_images_of_this_split_is_refused(make_run, make_shards):
    _, _, options = swept(make_run, make_shards)
    for config, words in (
        (pictures.Config(of="groups"), "there is no table groups"),
        (pictures.Config(of="feature_maps"), "feature_maps has no column key"),
        (pictures.Config(slices=("conv9",)), "top9 has no slice conv9; it has conv1, conv5"),
    ):
        with pytest.raises(RunError, match=words):
            sweep.run(pictures.ANALYSIS, options, config)
