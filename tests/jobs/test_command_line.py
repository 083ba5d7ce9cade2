"""Every job at the shell: its exit statuses, and a message instead of a stack for everything foreseen."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline import cluster
from pipeline.cluster import CannotSchedule
from pipeline.indexing import index_shards
from pipeline.runs import Run
from tests.conftest import CLASSES, ROOT, jpeg, random_model, samples
from tests.jobs import shell
from tests.jobs.shell import Done
from tests.pipeline.exact import assert_same
from tests.tars import offsets, write_tar
from zfnet.images import Preprocessing

ALONE = ("--workers.num", "0")
SWEEPS = {
    "top9": ("--part-size", "1", "--batch-size", "2", "--layers", "conv1", "conv2"),
    "deconv": ("--part-size", "1", "--batch-size", "2", "--layers", "conv2"),
    "occlusion": ("--part-size", "1", "--first", "4", "--stride-px", "20"),
}
TABLES = {"top9": ("top9", "feature_maps"), "deconv": ("deconv",), "occlusion": ("occlusion",)}
TRAIN = ("--batch", "8", "--epochs", "2", "--decoders", "0", *ALONE)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A place with sound shards (data), a run with a model (run), images in folders (photos) and a plain file (file).

    Tests write beside these, never into them.
    """
    place = tmp_path_factory.mktemp("world")
    make_data(place / "data", train=samples(24, seed=1), val=samples(10, seed=2))
    make_run(place / "run", seed=0)
    make_run(place / "other", seed=1)
    rng = np.random.default_rng(3)
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg"):
        (place / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "photos" / name).write_bytes(jpeg(rng))
    (place / "file").write_text("a file where a folder is needed")
    return place


def make_data(folder: Path, **splits: list) -> Path:
    folder.mkdir()
    for split, pictures in splits.items():
        write_tar(folder / f"{split}-000000.tar", pictures)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(p) for p in folder.glob("*.tar")], str(folder), classes=None, accept_damaged=False)
    return folder


def make_run(folder: Path, seed: int) -> None:
    network = random_model(len(CLASSES), seed)
    preprocessing = Preprocessing(
        resize_px=network.resize_px, crop_px=network.input_px, mean=torch.full((3, 1, 1), 120.0)
    )
    Run.at(str(folder)).save_model(
        network, architecture="zfnet_small", classes=CLASSES, preprocessing=preprocessing, about={}
    )


@pytest.fixture
def run(world, tmp_path) -> Path:
    """A copy of the run, to write to."""
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


def sweep(job: str, run: Path, data: Path, *more: object, **how: object) -> Done:
    return shell.run(job, "--run", run, "--data", data, *ALONE, *SWEEPS[job], *more, **how)


def sound(done: Done, status: int = 0) -> Done:
    """The status that was expected, and no stack."""
    assert done.status == status, done.out + done.err
    assert "Traceback" not in done.err + done.out
    return done


def refused(done: Done, *words: str) -> None:
    """Status 1, one message on stderr with these words in this order, and no stack."""
    sound(done, 1)
    assert done.err.count("error: ") == 1
    message = done.err[done.err.index("error: ") :]
    places = [message.find(word) for word in words]
    assert places == sorted(places), message
    assert -1 not in places, message


# ---------------------------------------------------------------------------------------------- the wrong command line


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("top9", ("--nope", "3"), ("Unrecognized options: --nope",)),
        ("shards", ("rendered", "--train", "-3", "--out", "none"), ("--train is -3", "0 or more")),
        ("train", ("--epochs", "many"), ("many", "--epochs")),
        ("train", ("--schedule", "nope"), ("nope", "cosine", "plateau")),
        ("top9", ("--workers.num", "-1"), ("--workers.num is -1: give at least 0",)),
        ("top9", ("--workers.gpus", "nan"), ("--workers.gpus is nan: give 0 or more",)),
        ("train", ("--workers.on", "CPU"), ("--workers.on is 'CPU': give a", "accelerator_type")),
        ("top9", ("--decoders.on", "GPU"), ("--decoders.on is 'GPU': give a", "accelerator_type")),
        ("shards", ("rendered", "--samples-per-shard", "0"), ("--samples-per-shard is 0: give at least 1",)),
        ("shards", ("rendered", "--seed", "-1"), ("--seed is -1: give 0 or more",)),
        ("shards", (), ("rendered, scenes, imagefolder, torchvision, ilsvrc2012", "index")),
        ("shards", ("imagefolder", "photos"), ("--out",)),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(world, job, arguments, words):
    done = sound(shell.run(job, *arguments, cwd=world), 2)
    text = " ".join((done.err + done.out).split())
    assert "--help" in text
    for word in words:
        assert word in text


# ------------------------------------------------------------------------------------------- refused, with what to do


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("top9", ("--data", "nowhere"), ("no index.json in", "nowhere", "python jobs/shards.py index")),
        ("train", ("--data", "nowhere"), ("no index.json in", "nowhere", "python jobs/shards.py index")),
        ("scratch", ("--data", "nowhere"), ("no index.json in", "nowhere", "python jobs/shards.py index")),
        ("scratch", ("--data", "data", "--images-per-class", "500"), ("500",)),
        pytest.param(
            "top9",
            ("--data", "data", "--split", "test"),
            ("no split 'test'", "train, val"),
        ),
        ("top9", ("--data", "data", "--layers", "conv9"), ("no layer 'conv9'", "Did you mean 'conv5'", "conv1, conv2")),
        ("top9", ("--data", "data", "--k", "0"), ("--k is 0", "at least 1")),
        ("top9", ("--data", "data", "--max-skipped", "20"), ("--max-skipped is 20.0", "from 0 to 1")),
        ("deconv", ("--data", "data"), ("run jobs/top9.py first",)),
        ("evolution", ("--data", "data"), ("no checkpoint of epoch any in", "has none", "train with jobs/train.py")),
        ("ablation", ("--data", "data", "--variants", "nope"), ("none called 'nope'", "Did you mean", "small, full")),
        ("ablation", ("--data", "nowhere"), ("no index.json in", "nowhere", "python jobs/shards.py index")),
        ("occlusion", ("--data", "data", "--keys", "nope"), ("no key 'nope'",)),
        ("occlusion", ("--data", "data", "--fill", "300"), ("--fill is 300", "from 0 to 255")),
        ("top9", ("--data", "nosuch://bucket"), ("cannot use 'nosuch://bucket'", "s3:// or gs://")),
    ],
)
def test_what_a_job_cannot_use_is_refused(world, job, arguments, words):
    refused(shell.run(job, "--run", "run", *arguments, *ALONE, cwd=world), *words)
    assert not (world / "run" / "results").exists()


WITHOUT_A_MODEL = {"ablation", "demo", "evolution", "figures", "import_model", "shards", "status", "train"}
OTHER_ARGUMENTS = {
    "train_localizer": ("--run", "new", "--from", "none", "--data", "data"),
    "train_detector": ("--run", "new", "--from", "none", "--data", "data"),
    "transfer_duplicates": ("--run", "none", "--layers", "fc6"),
}
READERS = sorted({path.stem for path in (shell.ROOT / "jobs").glob("[a-z]*.py")} - WITHOUT_A_MODEL)


@pytest.mark.parametrize("job", READERS)
def test_a_run_without_a_model_names_the_job_that_trains_one(world, tmp_path, job):
    """Before the default data set is drawn, which takes minutes."""
    arguments = OTHER_ARGUMENTS.get(job, ("--run", tmp_path / "none"))
    refused(shell.run(job, *arguments, cwd=world), "no trained model in", "python jobs/train.py --run")
    assert not (world / "shards").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--architecture", "zfnet_smal"), ("zfnet_smal", "Did you mean 'zfnet_small'")),
        (("--batch", "1000"), ("--batch is 1000", "24 images", "at most that")),
        (("--epochs", "0"), ("epochs is 0", "more than 0")),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_it_writes(world, tmp_path, arguments, words):
    refused(shell.run("train", "--run", tmp_path / "run", "--data", "data", *arguments, *ALONE, cwd=world), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("index",), ("given no shards", "name the tar files to index")),
        (("index", "data/*.nope"), ("no shard", "data/*.nope")),
        (("index", "data/val-000000.tar", "data/val-000000.tar"), ("same file name", "rename one")),
        (("index", "file"), ("damaged shards, nothing was written", "file: ", "--accept-damaged")),
        (("imagefolder", "nowhere"), ("no folder nowhere", "give the folder that holds the images")),
        (("imagefolder", "photos", "--validation-share", "20"), ("share is 20.0", "from 0 to 1")),
        (("torchvision", "CIFAR11"), ("no 'CIFAR11'", "for example CIFAR10")),
        (("ilsvrc2012", "photos"), ("lacks ILSVRC2012_img_train.tar", "official archives")),
        (("rendered", "--train", "0", "--val", "0"), ("no images: nothing to write",)),
    ],
)
def test_images_that_cannot_be_had_are_refused(world, tmp_path, arguments, words):
    refused(shell.run("shards", *arguments, "--out", tmp_path / "out", cwd=world), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("occlusion", ("--run", "run", "--data", "data", *ALONE, "--occluder-px", "999"), ("999", "1 to 64")),
        ("occlusion", ("--run", "run", "--data", "data", *ALONE, "--stride-px", "0"), ("0", "at least 1")),
        ("train", ("--run", "none", "--data", "data", *TRAIN, "--seed", "-1"), ("-1", "0 or more")),
        ("shards", ("index", "data/val-000000.tar", "--out", "none", "--classes", "no.txt"), ("no.txt", "no file")),
        ("shards", ("index", "data/val-000000.tar", "--out", "none", "--classes", "photos/a/1.jpg"), ("1.jpg",)),
    ],
)
def test_numbers_and_files_that_make_no_sense_are_refused(world, job, arguments, words):
    try:
        refused(shell.run(job, *arguments, cwd=world), *words)
    finally:
        shutil.rmtree(world / "none", ignore_errors=True)
        shutil.rmtree(world / "run" / "unfinished", ignore_errors=True)


def test_the_wrong_model_for_a_run_is_refused(world, run):
    sound(sweep("top9", run, world / "data"))
    weights = "model/weights.safetensors"
    shutil.copy(world / "other" / weights, run / weights)
    refused(sweep("top9", run, world / "data"), "the weights in", "run.json describes model", "bring back the one")
    shutil.copy(world / "other" / "run.json", run / "run.json")
    refused(sweep("top9", run, world / "data"), "finished with another configuration", "model_id", "give --name X")
    refused(sweep("deconv", run, world / "data"), "model")
    (run / weights).write_bytes(b"junk")
    refused(sweep("top9", run, world / "data"), "cannot be loaded", "train or import again into another --run")


def test_an_ablation_names_the_variant_that_failed_and_keeps_the_others(world, tmp_path):
    claim = tmp_path / "zfnet_small_no7" / "checkpoints" / "training.json"
    claim.parent.mkdir(parents=True)
    claim.write_text('{"seed": 9}')
    variants = ("--variants", "zfnet_small_no7", "zfnet_small")
    done = shell.run("ablation", "--run", tmp_path, "--data", world / "data", *variants, *TRAIN)
    refused(done, "1 of 2 variants failed", "zfnet_small_no7", "holds another training")
    assert pd.read_parquet(tmp_path / "results" / "ablation").variant.tolist() == ["zfnet_small"]
    claim.unlink()
    done = sound(shell.run("ablation", "--run", tmp_path, "--data", world / "data", *variants, *TRAIN))
    assert "ablation: zfnet_small: finished already" in done.out
    assert len(pd.read_parquet(tmp_path / "results" / "ablation")) == 2


def test_an_evolution_of_a_training_at_the_shell(world, tmp_path):
    sound(shell.run("train", "--run", tmp_path, "--data", world / "data", *TRAIN, "--keep-epochs", "1"))
    job = ("evolution", "--run", tmp_path, "--data", world / "data", "--layers", "conv1", *ALONE)
    done = sound(shell.run(*job))
    assert "projections, cosine to epoch 2" in done.out
    found = pd.read_parquet(tmp_path / "results" / "evolution")
    assert sorted(found.epoch.unique()) == [1, 2]
    assert sound(shell.run(*job)).out.count("finished already") == 3


# --------------------------------------------------------------------------------------------------- unwritable output


@pytest.mark.parametrize("place", ["file/run", "/proc/zfnet/run"])
def test_a_run_that_cannot_be_written_is_refused_by_training(world, place):
    done = shell.run("train", "--run", place, "--data", "data", *TRAIN, cwd=world)
    refused(done, "cannot write in", place, "choose a folder that can be written")


@pytest.mark.parametrize("address", ["foo", "foo:99999", "http://127.0.0.1:8265", "", "127.0.0.1", "a b:1"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(CannotSchedule, match=f"--address is {address!r}: give HOST:PORT of the cluster's head"):
        cluster._require_answer(address)


def test_an_address_that_is_none_is_refused_by_a_job(world, run):
    job = ("top9", "--run", run, "--data", world / "data", *SWEEPS["top9"])
    refused(shell.run(*job, "--address", "foo"), "--address is 'foo'", "give HOST:PORT", "auto")


@pytest.mark.parametrize("job", ["top9", "occlusion"])
def test_a_run_that_cannot_be_written_is_refused_by_sweeps(world, run, job):
    (run / "unfinished").write_text("a file where a folder is needed")
    refused(sweep(job, run, world / "data"), "cannot", str(run / "unfinished"), "choose")


@pytest.mark.parametrize("place", ["file/out", "/proc/zfnet/out"])
def test_a_place_that_cannot_be_written_is_refused_by_the_index(world, place):
    done = shell.run("shards", "index", "data/val-000000.tar", "--out", place, cwd=world)
    refused(done, "cannot write in", place, "choose a folder that can be written")


@pytest.mark.parametrize("place", ["file/out", "/proc/zfnet/out", "/proc/self"])
@pytest.mark.parametrize("source", [("imagefolder", "photos"), ("rendered", "--train", "2", "--val", "1")])
def test_a_place_that_cannot_be_written_is_refused_by_the_writer(world, source, place):
    refused(shell.run("shards", *source, "--out", place, cwd=world), "cannot write", place, "choose")


# ----------------------------------------------------------------------------------------------------------- disk full


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    """A run with all sweeps finished."""
    run = Path(shutil.copytree(world / "run", tmp_path_factory.mktemp("undisturbed") / "run"))
    for job in SWEEPS:
        sound(sweep(job, run, world / "data"))
    return run


@pytest.mark.parametrize("where", ["part", "table"])
@pytest.mark.parametrize("job", list(SWEEPS))
def test_a_full_disk_ends_a_sweep_and_the_same_command_finishes_it(world, undisturbed, tmp_path, job, where):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    largest = 2000 if where == "part" else max(p.stat().st_size for p in (run / "results" / job).iterdir()) - 1
    for table in TABLES[job]:
        shutil.rmtree(run / "results" / table)
        shutil.rmtree(run / "results" / "manifests" / table)
    done = sweep(job, run, world / "data", largest_file=largest)
    refused(done, "cannot write", "File too large", "free space", "the same command again")
    assert not (run / "results" / "manifests" / job).exists()
    parts = [path for path in run.glob("unfinished/*/*/parts/*") if ".tmp-" not in path.name]
    assert len(parts) == (0 if where == "part" else 4 if job == "occlusion" else 10)
    sound(sweep(job, run, world / "data"))
    assert_same(undisturbed, run, *TABLES[job])
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name]
    assert not list((run / "unfinished").glob("*"))


def test_a_full_disk_ends_training_and_the_same_command_finishes_it(world, tmp_path):
    def train(name: str, **how: int) -> Done:
        return shell.run("train", "--run", tmp_path / name, "--data", world / "data", *TRAIN, **how)

    sound(train("whole"))
    refused(train("run", largest_file=100_000), "cannot write", "epoch-0001", "File too large", "free space")
    assert not (tmp_path / "run" / "run.json").exists()
    sound(train("run"))
    one, two = ((tmp_path / name / "model" / "weights.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == two
    assert pd.read_parquet(tmp_path / "run" / "metrics").epoch.tolist() == [1, 2]
    assert not [path for path in tmp_path.rglob("*") if ".tmp-" in path.name]


def test_a_full_disk_ends_the_pages_and_the_same_command_finishes_them(undisturbed, tmp_path):
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    refused(shell.run("atlas", "--run", run, largest_file=500), "cannot write", "File too large", "free space")
    assert not (run / "atlas" / "index.html").exists()
    for folder in (run, undisturbed):
        sound(shell.run("atlas", "--run", folder))
    pages = [sorted(p.relative_to(r) for p in (r / "atlas").rglob("*")) for r in (run, undisturbed)]
    assert pages[0] == pages[1]


def test_the_page_that_is_named_last_is_there(undisturbed):
    done = sound(shell.run("atlas", "--run", undisturbed))
    *_, finished, following = done.out.splitlines()
    assert Path(finished.rpartition(": ")[2]) == undisturbed / "atlas" / "index.html"
    assert following.startswith("next: python jobs/figures.py --run")
    assert (undisturbed / "atlas" / "index.html").is_file()


def shards_on_a_full_disk(world: Path, out: Path) -> Done:
    return shell.run("shards", "imagefolder", "photos", "--out", out, cwd=world, largest_file=5000)


def test_a_full_disk_leaves_no_index_and_the_same_command_finishes_the_shards(world, tmp_path):
    assert shards_on_a_full_disk(world, tmp_path / "out").status == 1
    assert not (tmp_path / "out" / "index.json").exists()
    for name in ("out", "whole"):
        sound(shell.run("shards", "imagefolder", "photos", "--out", tmp_path / name, cwd=world))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("out", "whole"))
    assert one == two


def test_a_full_disk_is_named_by_the_writer_of_shards(world, tmp_path):
    refused(shards_on_a_full_disk(world, tmp_path / "out"), "cannot write", "File too large", "free space")


# ------------------------------------------------------------------------------------- images and shards that are bad


def png(width: int, height: int) -> bytes:
    """A black PNG of any size, whole and valid: 112 MB of rows for 30,000 x 30,000, packed to a few kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(9), bytes(1 + -(-width // 8))
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def odd_samples() -> list:
    """Twelve samples, of which seven are sound for a sweep and four for training; two of them are small."""
    rng = np.random.default_rng(8)
    found = samples(12, seed=7)

    def put(place: int, **members: bytes | None) -> None:
        key, old = found[place]
        found[place] = key, {suffix: data for suffix, data in (old | members).items() if data is not None}

    put(0, jpg=None, png=png(30_000, 30_000))  # too_large
    put(1, jpg=found[1][1]["jpg"][:300])  # bad_image
    put(2, jpg=b"")  # empty_file
    put(3, jpg=None)  # no_image
    put(4, jpg=b"not an image")  # bad_image
    put(5, cls=None)
    put(6, cls=b"77")
    put(7, cls=b"cat")
    put(8, jpg=jpeg(rng, 10, 12))
    put(9, jpg=jpeg(rng, 1, 3))
    return found


@pytest.fixture(scope="module")
def odd(world) -> Path:
    return make_data(world / "odd", val=odd_samples(), train=odd_samples())


SKIPPED = ["too_large", "bad_image", "empty_file", "no_image", "bad_image"]


def reasons(run: Path, table: str) -> list[str]:
    frame = pd.read_parquet(run / "results" / "skipped").query(f"table == '{table}'").sort_values("key")
    assert frame.detail.str.len().min() > 0
    return frame.reason.tolist()


def test_bad_images_are_skipped_by_reason_and_end_a_sweep_with_status_3(run, odd):
    done = sound(sweep("top9", run, odd), 3)
    assert "5 of 12 samples skipped (" in done.out
    assert "1 too_large" in done.out
    assert "see results/skipped" in done.out
    assert reasons(run, "top9") == SKIPPED
    entry = json.loads((run / "results" / "manifests" / "top9" / "conv1.json").read_text())
    assert entry["samples"] == 12
    assert entry["skipped"] == {"too_large": 1, "bad_image": 2, "empty_file": 1, "no_image": 1}
    assert set(pd.read_parquet(run / "results" / "feature_maps").images) == {7}
    again = sound(sweep("top9", run, odd), 3)
    assert "finished already" in again.out
    sound(sweep("top9", run, odd, "--max-skipped", "0.5"))


def test_labels_that_are_missing_or_out_of_range_do_not_hold_up_a_sweep(run, odd):
    sound(sweep("top9", run, odd, "--k", "12"), 3)
    frame = pd.read_parquet(run / "results" / "top9").drop_duplicates("key").set_index("key")
    labels = frame.label.astype("Int64")
    assert labels["s7-0006"] == 77
    assert pd.isna(frame.label_name["s7-0006"])
    assert pd.isna(labels["s7-0005"])
    assert pd.isna(labels["s7-0007"])
    assert "s7-0008" in frame.index, "an image smaller than the crop works"
    sound(sweep("occlusion", run, odd, "--first", "12"), 3)
    occluded = pd.read_parquet(run / "results" / "occlusion").set_index("key")
    unknown = occluded.loc[["s7-0005", "s7-0006", "s7-0007"]]
    assert unknown.target_class.tolist() == unknown.clean_class.tolist()
    assert len(occluded) == 7


def test_training_skips_what_it_cannot_use_and_ends_with_status_3(tmp_path, odd):
    more = ("--batch", "9", "--epochs", "1")
    done = sound(shell.run("train", "--run", tmp_path, "--data", odd, *TRAIN, *more), 3)
    assert "16 of 24 samples skipped" in done.out  # eight of each split
    assert set(reasons(tmp_path, "train")) == {*SKIPPED, "no_label", "label_out_of_range"}


def test_training_goes_on_over_a_batch_of_nothing_but_bad_images(tmp_path, odd):
    more = ("--batch", "1", "--epochs", "1")
    sound(shell.run("train", "--run", tmp_path, "--data", odd, *TRAIN, *more), 3)


def cut(path: Path, member: int, kind: str) -> None:
    header, data, _ = offsets(path)[member]
    at = {"inside a member": data + 10, "at a border": header, "inside a header": header + 200, "empty": 0}[kind]
    path.write_bytes(path.read_bytes()[:at])


KINDS = ["inside a member", "at a border", "inside a header", "empty"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_shard_is_not_indexed(tmp_path, kind):
    path = write_tar(tmp_path / "val-000000.tar", samples(10))
    cut(path, 8, kind)
    done = shell.run("shards", "index", path, "--out", tmp_path / "index")
    refused(done, "damaged shards, nothing was written", "val-000000.tar: ", "samples before it", "--accept-damaged")
    assert not (tmp_path / "index").exists()
    if kind != "empty":
        sound(shell.run("shards", "index", path, "--out", tmp_path / "index", "--accept-damaged"))
        assert json.loads((tmp_path / "index" / "index.json").read_text())["splits"]["val"]["samples"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_truncated_after_its_index_was_made_loses_no_sample_without_a_word(run, tmp_path, kind):
    data = make_data(tmp_path / "data", val=samples(10))
    cut(data / "val-000000.tar", 8, kind)
    done = sweep("top9", run, data)
    if kind == "empty":
        refused(done, "not one image could be read", "10 truncated")
        return
    assert "6 of 10 samples skipped (6 truncated)" in sound(done, 3).out
    assert reasons(run, "top9") == ["truncated"] * 6


def test_a_shard_that_is_gone_fails_the_sweep(run, tmp_path):
    data = make_data(tmp_path / "data", val=samples(3))
    (data / "val-000000.tar").unlink()
    refused(sweep("top9", run, data), "val-000000.tar", "bring it back")


def test_a_duplicate_key_is_refused(tmp_path):
    pictures = samples(3)
    write_tar(tmp_path / "val-000000.tar", pictures)
    write_tar(tmp_path / "val-000001.tar", pictures[1:2])
    done = shell.run("shards", "index", *sorted(tmp_path.glob("*.tar")), "--out", tmp_path / "index")
    refused(done, "key 's0-0001' occurs 2 times", "rename or remove all but one")
    assert not (tmp_path / "index").exists()


def test_bad_files_in_a_folder_go_into_the_shards_and_are_skipped_later(run, tmp_path):
    """What is wrong with an image is found by its reader, so that nothing of the source is lost without a word."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for key, members in odd_samples():
        for suffix in members.keys() & {"jpg", "png"}:
            (photos / f"{key}.{suffix}").write_bytes(members[suffix])
    sound(shell.run("shards", "imagefolder", photos, "--out", tmp_path / "data", "--validation-share", "1"))
    done = sound(sweep("top9", run, tmp_path / "data"), 3)
    assert "4 of 11 samples skipped" in done.out
    assert reasons(run, "top9") == [reason for reason in SKIPPED if reason != "no_image"]


# ----------------------------------------------------------------------------------------------------------- interrupt


def start(job: str, *arguments: object, cwd: Path = ROOT, **how: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **how,
    )


INTERRUPTED_SECONDS = 20.0
"""After Ctrl-C or SIGTERM a job has ended; docs/reliability.md says so."""
SIGNALS = [signal.SIGINT, signal.SIGTERM]
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def ended(process: subprocess.Popen, number: signal.Signals) -> str:
    """Send Ctrl-C to the whole process group, as a terminal does, or SIGTERM twice, as `timeout` does; returns what the
    job said on stderr."""
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
        time.sleep(0.01)
        os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    print(f"it ended {time.monotonic() - began:.1f} s after {number.name}")
    assert time.monotonic() - began < INTERRUPTED_SECONDS
    assert process.returncode == 128 + number, out + err
    assert not re.search("Traceback|SIGTERM received|Exception ignored|core dumped", out + err), out + err
    assert err.count(f"{WORDS[number]}; what is done is kept. To go on: ") == 1, out + err
    return err


def wait_for(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.poll() is None, "it was finished before the signal"


SLOW_SWEEP = ("--part-size", "1", "--first", "10", "--stride-px", "4")


def check_ended(run: Path, data: Path, number: signal.Signals, *workers: str) -> None:
    """A signal in the middle of a sweep, then the command that the message gives."""
    process = start("occlusion", "--run", run, "--data", data, *SLOW_SWEEP, *workers, cwd=run)
    wait_for(process, lambda: len(list(run.glob("unfinished/occlusion/*/parts/part-*"))) >= 2)
    assert list(run.glob("unfinished/occlusion/*/lease.json"))
    err = ended(process, number)
    assert not list(run.glob("unfinished/occlusion/*/lease.json")), "it is given back"
    assert not (run / "results" / "manifests" / "occlusion").exists()
    command = err.partition("To go on: ")[2].splitlines()[0]
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "of 10 parts to do" in done.stdout
    assert "10 of 10 parts to do" not in done.stdout


@pytest.mark.parametrize("number", SIGNALS)
def test_a_sweep_that_is_ended_says_how_to_go_on_and_the_command_finishes_it(world, run, tmp_path, number):
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    check_ended(run, world / "data", number, *ALONE)
    sound(shell.run("occlusion", "--run", whole, "--data", world / "data", *SLOW_SWEEP, *ALONE))
    assert_same(whole, run, "occlusion")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_a_sweep_on_ray_that_is_ended_says_how_to_go_on(world, run, number):
    check_ended(run, world / "data", number)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [ALONE, ("--workers.num", "1")])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_training_that_is_ended_says_how_to_go_on(world, tmp_path, number, workers):
    options = ("--batch", "8", "--decoders", "0", "--epochs", "500", *workers)
    process = start("train", "--run", tmp_path, "--data", world / "data", *options)
    wait_for(process, (tmp_path / "checkpoints" / "epoch-0002" / "manifest.json").exists)
    assert "--epochs 500" in ended(process, number)
    assert not (tmp_path / "unfinished" / "train" / "lease.json").exists()


@pytest.mark.parametrize("after", [0.04, 0.1, 0.2, 0.6])
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("job", ["top9", "shards"])
def test_a_job_that_is_ended_while_it_starts_shows_no_stack(world, job, number, after):
    """What takes long to import comes after what meets the signals."""
    process = start(job, *(("index", "nothing-*") if job == "shards" else ("--run", world / "none")))
    time.sleep(after)
    ended(process, number)


def test_a_signal_while_libraries_are_imported_is_not_lost_in_them(world):
    process = start("top9", "--run", world / "none", "--data", world / "data")
    wait_for(process, lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    ended(process, signal.SIGINT)


def test_ctrl_c_that_the_shell_has_ignored_stays_ignored(world):
    """nohup does so with SIGHUP, a script with SIGINT for what it starts in the background."""
    process = start("status", world / "none", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "error: " in err
