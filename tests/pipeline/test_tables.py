"""Tables read with this package and without it: the same rows, types and pictures."""

import io
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from docs.generate.tables import found as declared
from pipeline import metrics, sweep, tables
from pipeline.analyses import deconv, evaluation, occlusion, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.indexing import index_shards
from pipeline.runs import Run
from tests.conftest import CLASSES, random_model, samples
from tests.tars import write_tar
from zfnet.images import Preprocessing

VALUES = ("float32", "float16", "png")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A run with top9, deconv in all three forms, occlusion and the evaluation, of which one sample has no label."""
    place = tmp_path_factory.mktemp("tables")
    pictures = samples(8)
    pictures[3][1].pop("cls")
    (place / "data").mkdir()
    write_tar(place / "data" / "val-000000.tar", pictures)
    (place / "data" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(place / "data" / "val-000000.tar")], str(place / "data"), classes=None, accept_damaged=False)
    network = random_model()
    size = {"resize_px": network.resize_px, "crop_px": network.input_px}
    Run.at(str(place / "run")).save_model(
        network,
        architecture="zfnet_small",
        classes=CLASSES,
        preprocessing=Preprocessing(**size, mean=torch.full((3, 1, 1), 120.0)),
        about={},
    )
    alone = Options(run=str(place / "run"), data=str(place / "data"), workers=Workers(num=0), max_skipped=1.0)
    sweep.run(top9.ANALYSIS, alone, top9.Config(layers=("conv1", "conv5"), k=2))
    for values in VALUES:
        named = Options(**{**vars(alone), "name": None if values == "float32" else values})
        sweep.run(deconv.ANALYSIS, named, deconv.Config(layers=("conv5",), values=values))
    sweep.run(occlusion.ANALYSIS, alone, occlusion.Config(first=2, stride_px=25))
    sweep.run(evaluation.ANALYSIS, alone, evaluation.Config())
    return str(place / "run")


def folder(run: str, table: str) -> str:
    return f"{run}/results/{table}"


def test_a_frame_has_the_types_of_the_schema(run):
    frame = tables.load(run, "top9")
    kinds = {name: str(kind) for name, kind in frame.dtypes.items()}
    assert {kinds[name] for name in ("layer", "key", "shard", "label_name")} == {"str"}
    assert (kinds["rank"], kinds["activation"], kinds["label"]) == ("int32", "float32", "Int32")
    assert frame.label.isna().any()
    assert frame.attrs["rank"] == "Place among the images of this feature map, from 1."
    assert set(frame.attrs) == set(frame.columns)


def test_a_frame_is_what_pandas_reads_alone(run):
    for table in ("top9", "feature_maps", "deconv", "occlusion", "predictions", "evaluation"):
        ours, theirs = tables.load(run, table), pd.read_parquet(folder(run, table))
        pd.testing.assert_frame_equal(ours.astype(theirs.dtypes.to_dict()), theirs, check_exact=True)


@pytest.mark.parametrize("table", ["top9", "feature_maps", "maxima", "deconv", "occlusion", "predictions"])
def test_pandas_polars_and_duckdb_read_the_same_without_this_package(run, table):
    arrow = pa.concat_tables([pq.read_table(path) for path in files(run, table)])
    expected = arrow.to_pylist()
    assert pl.read_parquet(folder(run, table)).to_dicts() == expected
    found = duckdb.sql(f"SELECT * FROM '{folder(run, table)}/*.parquet'")
    assert [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()] == expected
    assert pd.read_parquet(folder(run, table)).shape == arrow.shape


def files(run: str, table: str) -> list[Path]:
    return sorted(Path(folder(run, table)).iterdir())


def made(run: str) -> list[str]:
    """The tables with manifests."""
    return [path.name for path in Path(folder(run, "manifests")).iterdir()]


def test_every_file_is_documented(run):
    known = declared()
    for table in made(run):
        about = known[table.split("-")[0]]
        for path in files(run, table):
            schema = pq.read_schema(path)
            assert schema.metadata[b"table"].decode() == table.split("-")[0]
            for field in schema:
                documented = about.schema.field(field.name)
                assert field.metadata == documented.metadata or field.name == "projection"
                assert field.type == documented.type or field.name == "projection"


def test_a_key_names_one_row(run):
    known = declared()
    for table in made(run):
        assert not tables.load(run, table).duplicated(known[table.split("-")[0]].key).any(), table


def test_columns_and_filters_choose_what_is_read(run):
    frame = tables.load(run, "top9", columns=["layer", "rank"], filters=[("rank", "=", 1), ("layer", "=", "conv5")])
    assert list(frame.columns) == ["layer", "rank"]
    assert set(frame.layer) == {"conv5"}
    assert set(frame["rank"]) == {1}


def test_a_slice_that_is_not_finished_is_left_out(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "results" / "manifests" / "top9" / "conv5.json").unlink()
    assert set(tables.load(str(copy), "top9").layer) == {"conv1"}


def test_a_table_that_is_not_there_is_answered_with_those_that_are(run, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no finished table 'top10' in .*, which has .*deconv, .*top9: run the job"
    ):
        tables.load(run, "top10")
    with pytest.raises(FileNotFoundError, match="which has none: run the job that makes it"):
        tables.load(str(tmp_path), "top9")


# ------------------------------------------------------------------------------------------------------------ pictures


def rows(run: str, table: str) -> dict[str, dict]:
    """The first row as each library gives it."""
    frame = pl.read_parquet(folder(run, table))
    found = duckdb.sql(f"SELECT * FROM '{folder(run, table)}/*.parquet' LIMIT 1")
    return {
        "pandas": tables.load(run, table).iloc[0],
        "itertuples": next(tables.load(run, table).itertuples())._asdict(),
        "polars": frame.row(0, named=True),
        "duckdb": dict(zip(found.columns, found.fetchall()[0], strict=True)),
    }


@pytest.mark.parametrize("library", ["pandas", "itertuples", "polars", "duckdb"])
def test_a_row_of_any_library_gives_the_same_pictures(run, library):
    row = rows(run, "deconv")[library]
    patch, projection = tables.image(row), tables.image(row, "projection")
    height, width = row["projection_height"], row["projection_width"]
    assert (patch.shape, patch.dtype) == ((height, width, 3), np.uint8)
    assert np.array_equal(patch, np.asarray(Image.open(io.BytesIO(row["patch_png"]))))
    assert (projection.shape, projection.dtype) == ((height, width, 3), np.float32)
    assert np.array_equal(projection.reshape(-1), np.asarray(row["projection"], np.float32))


@pytest.mark.parametrize(("values", "error"), [("float16", 1e-3), ("png", 0.6 / 127)])
def test_a_projection_is_the_same_however_it_was_stored(run, values, error):
    exact, other = tables.load(run, "deconv"), tables.load(run, f"deconv-{values}")
    polars = pl.read_parquet(folder(run, f"deconv-{values}"))
    assert len(exact) == len(other) > 0
    for place in range(len(exact)):
        reference = tables.image(exact.iloc[place], "projection")
        for row in (other.iloc[place], polars.row(place, named=True)):
            found = tables.image(row, "projection")
            assert np.abs(found - reference).max() <= error * np.abs(reference).max()


def test_a_projection_of_nothing_is_zeros():
    row = {"projection": [0.0] * 12, "projection_height": 2, "projection_width": 2, "projection_scale": 0.0}
    assert np.array_equal(tables.image(row, "projection"), np.zeros((2, 2, 3), np.float32))


@pytest.mark.parametrize("library", ["pandas", "itertuples", "polars", "duckdb"])
def test_maps_have_the_shape_of_the_grid(run, library):
    row = rows(run, "occlusion")[library]
    for name in ("activation_map", "probability_map", "class_map"):
        found = tables.grid(row, name)
        assert found.shape == (row["grid_rows"], row["grid_cols"])
        assert found[1, 0] == row[name][row["grid_cols"]]
    assert np.array_equal(tables.grid(row), tables.grid(row, "probability_map"))
    assert tables.image(row).shape[2] == 3


def test_a_row_without_a_picture_says_so(run):
    with pytest.raises(KeyError, match="the row has no picture: name one"):
        tables.image(tables.load(run, "top9").iloc[0])
    with pytest.raises(KeyError, match="one_png, two_png: name one"):
        tables.image({"one_png": b"", "two_png": b""})


def test_the_metrics_of_training_are_read_too(make_run):
    place = make_run()
    for epoch in (1, 2):
        row = {name: float(epoch) if name == "validation_top1" else epoch for name in metrics.METRICS.names}
        metrics.write(Run.at(str(place)), row)
    assert tables.load(str(place), "metrics").validation_top1.tolist() == [1.0, 2.0]
    assert tables.load(str(place), "metrics").epoch.tolist() == [1, 2]
