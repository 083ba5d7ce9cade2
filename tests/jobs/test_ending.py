"""How a job ends: what it made, how long it took, what was skipped, and the command that comes next."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import shell
from tests.jobs.parse import would_take
from tests.pipeline.test_correspondence import face, write


def lines(*arguments: object) -> list[str]:
    done = shell.run(*arguments)
    assert done.status == 0, done.out + done.err
    return done.out.splitlines()


def test_a_sweep_ends_with_what_it_made_how_long_what_was_skipped_and_what_is_next(make_run, make_shards):
    run, data = make_run(), make_shards(val=[4])
    given = ("--run", run, "--data", data)
    alone = ("--workers.num", "0")
    made, skipped, following = lines("top9", *given, *alone, "--layers", "conv1")[-3:]
    assert re.fullmatch(rf"top9: finished in \d+\.\d s: {run}/results/top9", made)
    assert skipped == "top9: 0 of 4 samples skipped"
    assert following == f"next: python jobs/deconv.py --run {run} --data {data}"
    assert lines("top9", *given, *alone, "--layers", "conv1")[-1] == following


def test_shards_end_with_the_command_that_trains_on_them(tmp_path):
    out = tmp_path / "shapes"
    made, following = lines("shards", "rendered", "--out", out, "--train", "4", "--val", "2")[-2:]
    assert re.fullmatch(rf"shards: 4 train, 2 val images, 12 classes, in \d+\.\d s: {out}", made)
    assert following == f"next: python jobs/train.py --run runs/shapes --data {out}"


def test_training_ends_with_the_command_that_evaluates(make_shards, tmp_path):
    data, run = make_shards(train=[8], val=[4]), tmp_path / "run"
    options = ("--epochs", "1", "--batch", "4", "--workers.num", "0")
    *_, made, skipped, following = lines("train", "--run", run, "--data", data, *options)
    assert re.fullmatch(rf"train: model \w+ after \d+\.\d s: {run}", made)
    assert skipped == "train: 0 of 12 samples skipped"
    assert following == f"next: python jobs/evaluate.py --run {run} --data {data}"


TRAINING = ("--epochs", "1", "--batch", "4", "--decoders", "0")
ALONE = ("--workers.num", "0")
OVERFEAT, BOXES = ("--run", "{at}/overfeat"), ("--run", "{at}/boxes")
CALLS = [
    ("shards", ("scenes", "--out", "{at}/scenes", "--train", "40", "--val", "4")),
    ("train", ("--architecture", "zfnet_small", "--keep-epochs", "1", *TRAINING, *ALONE)),
    ("evaluate", ALONE),
    ("top9", ALONE),
    ("deconv", ("--layers", "conv2", *ALONE)),
    ("occlusion", ("--first", "1", "--stride-px", "20", *ALONE)),
    ("pictures", ALONE),
    ("invariance", ("--first", "1", "--layers", "conv1", *ALONE)),
    ("correspondence", ("--data", "{at}/faces", "--mask-px", "11", "--random", "2", *ALONE)),
    ("object_occlusion", ("--places", "2", *ALONE)),
    ("sanity", ("--layers", "conv5", "--ranks", "1", *ALONE)),
    ("evolution", ("--layers", "conv1", *ALONE)),
    ("features", ("--layers", "fc6", *ALONE)),
    ("features", ("--layers", "fc6", "--split", "train", *ALONE)),
    ("duplicates", ()),
    ("groups", ()),
    ("units", ()),
    ("retrieval", ()),
    ("transfer_duplicates", ("--layers", "fc6")),
    ("transfer", ("--layers", "fc6", "--images-per-class", "1", "--folds", "1", "--test-images", "1")),
    ("multilabel", ("--layers", "fc6")),
    ("scratch", ("--images-per-class", "1", "--folds", "1", "--test-images", "1", *TRAINING, *ALONE)),
    ("ablation", ("--variants", "zfnet_small", "--run", "{at}/ablation", *TRAINING, *ALONE)),
    ("figures", ("--images", "1")),
    ("atlas", ()),
    ("import_model", ("--architecture", "overfeat_fast_small", "--classes", "{at}/scenes/classes.txt", *OVERFEAT)),
    ("dense_maps", ("--first", "1", "--scales", "1", *OVERFEAT, *ALONE)),
    ("train_detector", ("--from", "{at}/overfeat", "--run", "{at}/detector", "--scales", "1", *TRAINING, *ALONE)),
    ("train_localizer", ("--from", "{at}/detector", "--scales", "1", *BOXES, *TRAINING, *ALONE)),
    ("localize", ("--scales", "1", *BOXES, *ALONE)),
    ("detect", ("--scales", "1", *BOXES, *ALONE)),
]
"""In an order in which each job finds what it needs."""
WITHOUT_IMAGES = {"duplicates", "groups", "units", "retrieval", "figures", "atlas", "import_model"}
WITHOUT_IMAGES |= {"transfer", "transfer_duplicates", "multilabel"}
MAKES = {"evaluate": "predictions", "localize": "localization", "detect": "detection"}
"""Tables of another name than their jobs'."""
FINDS = {
    "evaluate": "top-1 error",
    "invariance": "features move by this share of their length: conv1 ",
    "correspondence": "share of sign changes that differ between two images (lower: more alike): right_eye 0.",
    "object_occlusion": "images have a box of their class",
    "sanity": "give back their activation",
    "evolution": "filters, cosine to epoch",
    "ablation": "top1_error, %",
    "scratch": "1 a class: ",
    "localize": "localisation error",
    "detect": "mAP",
}
NEXT = {
    "shards": "train",
    "train": "evaluate",
    "evaluate": "top9",
    "top9": "deconv",
    "deconv": "occlusion",
    "occlusion": "pictures",
    "features": "retrieval",
    "duplicates": "units",
    "scratch": "figures",
    "ablation": "figures",
    "atlas": "figures",
    "import_model": "top9",
    "train_detector": "train_localizer",
    "train_localizer": "localize",
}
"""All others end with the atlas."""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[list[str]]:
    """What each job says, all in one run."""
    at = tmp_path_factory.mktemp("ends")
    rng = np.random.default_rng(0)
    write(at / "faces", [face(rng) for _ in range(2)])
    return [lines(job, *arguments(job, given, at)) for job, given in CALLS]


def arguments(job: str, given: tuple[str, ...], at: Path) -> list[str]:
    run = () if job == "shards" else ("--run", f"{at}/run")
    data = () if job in {"shards", *WITHOUT_IMAGES} else ("--data", f"{at}/scenes")
    return [argument.format(at=at) for argument in (*run, *data, *given)]


@pytest.mark.parametrize(("number", "job"), [(number, job) for number, (job, _) in enumerate(CALLS)])
def test_a_job_ends_with_what_it_made_how_long_it_took_what_it_found_and_what_is_next(said, number, job):
    *before, following = said[number]
    assert [line for line in before if re.search(rf"^{MAKES.get(job, job)}: .* \d+\.\d s: \S+$", line)]
    if job not in {"shards", *WITHOUT_IMAGES}:
        assert [line for line in before if line.endswith(" samples skipped")]
    assert FINDS.get(job, "") in "\n".join(before)
    would_take(following.removeprefix("next: "))
    assert shlex.split(following)[2] == f"jobs/{NEXT.get(job, 'atlas')}.py"


def test_a_forecast_says_nothing_of_an_earlier_evaluation_and_of_what_is_next(make_run, make_shards):
    given = ("--run", make_run(), "--data", make_shards(val=[4]), "--workers.num", "0")
    assert "top-1 error" in "\n".join(lines("evaluate", *given))
    planned = "\n".join(lines("evaluate", *given, "--plan"))
    assert "top-1 error" not in planned
    assert "next:" not in planned
