"""Every job once on a disk, once on S3 and once on Google's storage, in this process: the same tables, bit for bit.

Tiny networks, images and trainings; what the numbers mean is the business of other tests. Faults of the network and
many nodes are in test_s3.py.
"""

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from pipeline.runs import Run
from pipeline.sources.rendered import CLASSES
from pipeline.storage import Location
from tests.conftest import ROOT, jpeg, random_model
from tests.pipeline import gs, s3
from tests.pipeline.exact import bits
from tests.pipeline.test_correspondence import face
from tests.tars import write_tar

pytestmark = pytest.mark.slow
CLOCKED = ("seconds",)
"""Columns that say how long it took."""
ALONE = ("--workers.num", "0", "--workers.cpus", "1")
SCENES, FACES, PHOTOS = ("--data", "{at}/scenes"), ("--data", "{at}/faces"), ("--data", "{at}/photos")
TRAINING = ("--epochs", "2", "--batch", "8", "--decoders", "0", *ALONE)
SMALL = ("--part-size", "4", "--batch-size", "2", *ALONE)
BOXES = ("--scales", "1", "--part-size", "4", *ALONE)
ZFNET = ("--run", "{at}/zfnet")
OVERFEAT, LOCALIZER, DETECTOR = "{at}/overfeat", "{at}/localizer", "{at}/detector"


@dataclass(frozen=True)
class Call:
    """A job with its arguments, in which {at} is the place and {local} a local folder."""

    job: str
    arguments: tuple[str, ...]
    tables: tuple[str, ...] = ()
    """RUN/TABLE of the tables that it makes."""


def on_zfnet(job: str, *arguments: str, tables: tuple[str, ...] = ()) -> Call:
    return Call(job, (*ZFNET, *arguments), tuple(f"zfnet/{table}" for table in tables or (job,)))


CALLS = {
    "scenes": Call("shards", ("scenes", "--out", "{at}/scenes", "--train", "40", "--val", "12")),
    "imagefolder": Call("shards", ("imagefolder", "{local}/photos", "--out", "{at}/photos")),
    "index": Call("shards", ("index", "{at}/faces/val-000000.tar", "--out", "{at}/faces")),
    "train": Call("train", (*ZFNET, *SCENES, "--architecture", "zfnet_small", "--keep-epochs", "1", *TRAINING)),
    "import_model": Call(
        "import_model",
        (
            *("--run", "{at}/imported", "--architecture", "zfnet_small"),
            *("--weights", "{at}/weights.safetensors", "--classes", "{at}/scenes/classes.txt"),
        ),
    ),
    "top9": on_zfnet("top9", *SCENES, *SMALL, tables=("top9", "feature_maps", "maxima")),
    "top9 of the imported": Call("top9", ("--run", "{at}/imported", *SCENES, *SMALL), ("imported/top9",)),
    "deconv": on_zfnet("deconv", *SCENES, *SMALL, "--layers", "conv5"),
    "occlusion": on_zfnet("occlusion", *SCENES, *ALONE, "--first", "2", "--stride-px", "20"),
    "evaluate": on_zfnet(
        "evaluate", *SCENES, *SMALL, tables=("predictions", "confusion", "class_errors", "evaluation")
    ),
    "evolution": on_zfnet(
        *("evolution", *SCENES, *SMALL, "--layers", "conv1"),
        tables=("evolution", "evolution_cells", "evolution_convergence"),
    ),
    "invariance": on_zfnet("invariance", *SCENES, *ALONE, "--first", "1", "--layers", "conv1"),
    "correspondence": on_zfnet(
        *("correspondence", *FACES, *ALONE, "--mask-px", "11", "--random", "2", "--part-size", "2"),
        tables=("correspondence", "correspondence_pairs", "correspondence_images"),
    ),
    "object_occlusion": on_zfnet("object_occlusion", *SCENES, *ALONE, "--places", "2", "--part-size", "3"),
    "features": on_zfnet("features", *SCENES, *SMALL, "--layers", "fc6"),
    "features to train on": on_zfnet("features", *SCENES, *SMALL, "--layers", "fc6", "--split", "train"),
    "transfer": on_zfnet("transfer", "--images-per-class", "1", "--folds", "1"),
    "transfer_duplicates": on_zfnet("transfer_duplicates", "--layers", "fc6"),
    "retrieval": on_zfnet("retrieval"),
    "multilabel": on_zfnet("multilabel"),
    "groups": on_zfnet("groups"),
    "duplicates": on_zfnet("duplicates"),
    "duplicates of the imported": Call("duplicates", ("--run", "{at}/imported"), ("imported/duplicates",)),
    "units": on_zfnet("units", "--against", "{at}/imported", tables=("units", "units_comparison")),
    "pictures": on_zfnet("pictures", *SCENES, *SMALL, "--picture-px", "32"),
    "sanity": on_zfnet("sanity", *SCENES, *ALONE, "--layers", "conv5", "--ranks", "1"),
    "ablation": Call(
        "ablation", ("--run", "{at}/ablation", *SCENES, "--variants", "zfnet_small", *TRAINING), ("ablation/ablation",)
    ),
    "scratch": on_zfnet(
        *("scratch", *SCENES, "--images-per-class", "1", "--folds", "1", "--test-images", "1"),
        *("--epochs", "1", "--batch", "4", "--decoders", "0", *ALONE),
    ),
    "train overfeat": Call("train", ("--run", OVERFEAT, *SCENES, "--architecture", "overfeat_fast_small", *TRAINING)),
    "train_localizer": Call(
        "train_localizer", ("--run", LOCALIZER, "--from", OVERFEAT, *SCENES, "--scales", "1", *TRAINING)
    ),
    "localize": Call(
        "localize",
        ("--run", LOCALIZER, *SCENES, *BOXES),
        ("localizer/localization", "localizer/localization_images", "localizer/localization_windows"),
    ),
    "train_detector": Call(
        "train_detector", ("--run", DETECTOR, "--from", OVERFEAT, *SCENES, "--scales", "1", *TRAINING)
    ),
    "train_localizer of the detector": Call(
        "train_localizer", ("--run", "{at}/boxed", "--from", DETECTOR, *SCENES, "--scales", "1", *TRAINING)
    ),
    "detect": Call(
        "detect",
        ("--run", "{at}/boxed", *SCENES, *BOXES),
        tuple(f"boxed/detection{of}" for of in ("", "_objects", "_windows", "_curves", "_classes")),
    ),
    "dense_maps": Call(
        "dense_maps", ("--run", OVERFEAT, *PHOTOS, "--split", "train", *SMALL), ("overfeat/dense_maps",)
    ),
    "status": Call("status", ("{at}/zfnet",)),
    "figures": Call("figures", (*ZFNET, "--images", "1")),
    "atlas": Call("atlas", ZFNET),
}
"""In an order in which each finds what it needs."""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What jobs are given that is on no object store."""
    folder = tmp_path_factory.mktemp("jobs")
    rng = np.random.default_rng(0)
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg"):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(jpeg(rng))
    write_tar(folder / "faces.tar", [(f"k{number}", face(rng)) for number in range(3)])
    return folder


@pytest.fixture(scope="module")
def disk(local):
    """A local folder in which all jobs were run, and what went wrong, by job."""
    with pytest.MonkeyPatch.context() as patch:
        yield Location.of(str(local / "disk")), made(str(local / "disk"), local, patch)


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, local):
    """The same of a bucket."""
    with pytest.MonkeyPatch.context() as patch, (s3 if request.param == "s3" else gs).served() as proxy:
        there = {**s3.ENVIRONMENT, "AWS_ENDPOINT_URL": proxy.endpoint}
        for name, value in (there if request.param == "s3" else gs.environment(proxy)).items():
            patch.setenv(name, value)
        place = f"{request.param}://bucket/jobs"
        yield Location.of(place), made(place, local, patch)


def made(place: str, local: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Run all jobs: what those said that failed."""
    (Location.of(place) / "faces" / "val-000000.tar").write((local / "faces.tar").read_bytes())
    (Location.of(place) / "weights.safetensors").write(save(random_model(len(CLASSES)).state_dict()))
    said = {name: run(call, place, local, patch) for name, call in CALLS.items()}
    return {name: why for name, why in said.items() if why}


def run(call: Call, place: str, local: Path, patch: pytest.MonkeyPatch) -> str:
    """The job in this process; what it said where it did not end with 0."""
    given = [argument.format(at=place, local=local) for argument in call.arguments]
    path = str(ROOT / "jobs" / f"{call.job}.py")
    patch.setattr(sys, "argv", [path, *given])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    return "" if not ended.value.code else said.getvalue()


@pytest.mark.parametrize("name", CALLS)
def test_a_job_in_a_bucket_makes_what_it_makes_on_a_disk(disk, bucket, name):
    assert [failed.get(name) for _, failed in (disk, bucket)] == [None, None]
    for table in CALLS[name].tables:
        run, _, table_name = table.partition("/")
        one, other = (files(place / run / "results" / table_name) for place, _ in (disk, bucket))
        assert one, table
        assert list(one) == list(other)
        for file, rows in one.items():
            assert rows.schema.equals(other[file].schema, check_metadata=True)
            assert bits(rows) == bits(other[file]), (table, file)


def files(folder: Location) -> dict:
    """The tables of a folder."""
    read = {name: pq.read_table((folder / name).path, filesystem=folder.filesystem) for name in folder.names()}
    return {name: rows.drop_columns([n for n in rows.column_names if n in CLOCKED]) for name, rows in read.items()}


@pytest.mark.parametrize("run", ["zfnet", "imported", "ablation/zfnet_small", "overfeat", "localizer", "detector"])
def test_what_was_trained_or_imported_in_a_bucket_is_the_same_network(disk, bucket, run):
    one, other = (Run.at(str(place / run)).load_model() for place, _ in (disk, bucket))
    assert one.model_id == other.model_id
    assert all(torch.equal(value, other.network.state_dict()[name]) for name, value in one.network.state_dict().items())


@pytest.mark.parametrize("folder", ["zfnet/atlas", "zfnet/figures"])
def test_pages_and_figures_in_a_bucket_are_the_same_files(disk, bucket, folder):
    one, other = (listed(place / folder) for place, _ in (disk, bucket))
    assert one
    assert one == other


def listed(folder: Location) -> list[str]:
    found = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    return sorted(info.path.removeprefix(folder.path) for info in found if info.type == pafs.FileType.File)


def test_nothing_unfinished_stays_in_the_bucket(bucket):
    assert not [name for name in listed(bucket[0]) if ".tmp-" in name or "/unfinished/" in name]


def test_every_job_is_run():
    """But for the demo, which has no sizes: it calls train, top9, deconv, ..., pictures and the atlas."""
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "demo"}
    assert jobs == {call.job for call in CALLS.values()}
