"""How a job ends: what it made, how long it took, what was skipped, and the command that comes next."""

import re

from tests.jobs import shell


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
    assert lines("deconv", *given, *alone)[-1] == f"next: python jobs/occlusion.py --run {run} --data {data}"
    assert lines("duplicates", "--run", run)[-1] == f"next: python jobs/units.py --run {run}"
    assert lines("units", "--run", run)[-1] == f"next: python jobs/atlas.py --run {run}"
    assert not any(line.startswith("next:") for line in lines("occlusion", *given, *alone, "--plan"))


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
