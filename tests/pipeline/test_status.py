"""What a run directory says of itself: made by real jobs, with times set by the test."""

import json
import os
from dataclasses import asdict
from functools import reduce

import pytest

from pipeline import metrics, status, sweep
from pipeline.errors import SweepFailed
from pipeline.runs import Run, RunError
from pipeline.storage import Location
from tests.jobs import shell
from tests.pipeline.test_sweep import break_after, run_top9

NOW = 1_800_000_000.0


@pytest.fixture
def now(monkeypatch):
    monkeypatch.setattr(status.time, "time", lambda: NOW)


def set_times(folder, *seconds_ago):
    """Of the files of a folder, in the order of their names."""
    for path, ago in zip(sorted(folder.iterdir()), seconds_ago, strict=True):
        os.utime(path, (NOW - ago, NOW - ago))


@pytest.fixture
def half_done(make_run, make_shards, monkeypatch):
    """A run with a sweep of 7 parts, 26 images, of which it did the first few."""
    data, run = make_shards(val=[20, 6]), make_run()
    with monkeypatch.context() as patch:
        break_after(patch, 3)
        with pytest.raises(SweepFailed):
            run_top9(run, data, part_size=4)
    (parts,) = (run / "unfinished" / "top9").glob("*/parts")
    for path in sorted(parts.iterdir())[3:]:  # two are under way at once: a fourth may have come through
        path.unlink()
    return run, data, parts


def test_what_is_left_how_fast_it_goes_and_how_long_it_takes(half_done, now):
    run, _, parts = half_done
    set_times(parts, 70, 50, 30)
    found = status.read(str(run))
    (work,) = found.unfinished
    assert (work.table, work.work) == ("top9", parts.parent.name)
    assert work.slices == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert (work.parts, work.parts_done, work.samples) == (7, 3, 26)
    assert work.images_per_second == pytest.approx(2 / 40 * 26 / 7)
    assert work.seconds_left == pytest.approx(4 * 20)
    assert work.seconds_ago == pytest.approx(30)
    assert found.finished == []
    assert (found.architecture, found.training) == ("zfnet_small", None)
    assert found.model_id == Run.at(str(run)).describe()["model_id"]


def test_the_same_command_then_finishes_it_and_says_what_was_skipped(half_done, capsys):
    run, data, _ = half_done
    run_top9(run, data, part_size=4)
    found = status.read(str(run))
    assert found.unfinished == []
    tables = {table.table: table for table in found.finished}
    assert set(tables) == {"top9", "feature_maps", "maxima"}
    assert (tables["top9"].slices, tables["top9"].samples, tables["top9"].skipped) == (5, 26, {})
    assert tables["maxima"].rows == 5 * 26
    capsys.readouterr()
    assert status.run(str(run), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == asdict(found)


@pytest.mark.parametrize(
    ("ago", "expected"),
    [
        ([], None),
        ([5.0], None),
        ([0.0, 0.0], None),
        ([30.0, 20.0, 10.0], 2 / 20),
        # An hour's pause before the last ten minutes does not count, if enough was done since.
        ([4000.0, *(500.0 - 50 * n for n in range(10))], 9 / 450),
        # Parts that take an hour each.
        ([3 * 3600.0, 2 * 3600.0, 3600.0], 1 / 3600),
        # Eight workers that end together every half hour.
        ([3600.0] * 8 + [1800.0] * 8, 8 / 1800),
    ],
)
def test_the_rate_is_that_of_the_newest_parts(ago, expected):
    found = status._parts_per_second([NOW - seconds for seconds in ago])
    assert found == (expected and pytest.approx(expected))


def test_work_that_is_finished_and_not_yet_cleared_is_not_left(half_done, monkeypatch):
    run, data, _ = half_done
    monkeypatch.setattr(sweep, "clear_finished", lambda *arguments: None)
    run_top9(run, data, part_size=4)
    assert (run / "unfinished" / "top9").exists()
    assert status.read(str(run)).unfinished == []


def test_training_under_way(make_shards, tmp_path, now):
    """As a training leaves it that was killed in its second epoch."""
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    (checkpoints / "epoch-0001").mkdir(parents=True)
    (checkpoints / "epoch-0001" / "manifest.json").write_text("{}")
    (checkpoints / "training.json").write_text(json.dumps({"recipe": {"epochs": 3}}))
    pace = {"step": 150, "steps": 100, "images_per_second": 80.0, "data_wait_share": 0.1, "seconds_left": 60.0}
    metrics.pace_file(Run.at(str(run))).write(json.dumps(pace).encode())
    set_times(checkpoints, 40, 5, 100)
    assert status.read(str(run)).training == status.Training(
        epoch=1, epochs=3, step=150, images_per_second=80.0, seconds_left=60.0, seconds_ago=5.0
    )
    (checkpoints / "pace.json").unlink()
    assert status.read(str(run)).training == status.Training(
        epoch=1, epochs=3, step=None, images_per_second=None, seconds_left=None, seconds_ago=40.0
    )


def test_a_real_training_writes_what_is_read(make_shards, tmp_path, monkeypatch):
    """Stopped after an epoch: the claim names the epochs, and the checkpoint's folder the one that is done."""
    from pipeline import loop, train
    from tests.pipeline.test_train import options

    data, run = make_shards(train=[16], val=[4]), tmp_path / "run"

    def stop(self):
        raise RunError("the power went")

    monkeypatch.setattr(loop.Trainer, "_finish", stop)
    with pytest.raises(RunError, match="the power went"):
        train.run(options(run, data, epochs=2))
    found = status.read(str(run)).training
    assert (found.epoch, found.epochs) == (2, 2)
    assert 0 <= found.seconds_ago < 60


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="there is no run in .+nothing was trained, imported or swept there"):
        status.read(str(tmp_path))


def test_the_job_says_it_in_lines(half_done):
    run, _, _ = half_done
    done = shell.run("status", run)
    assert (done.status, done.err) == (0, "")
    model_id = Run.at(str(run)).describe()["model_id"]
    first, second = done.out.splitlines()
    assert first == f"{run}: model {model_id}, zfnet_small"
    assert second.startswith("  under way top9: 3 of 7 parts, ")
    assert " images/s, " in second
    assert second.endswith(" ago")
    done = shell.run("status", run.parent / "nowhere")
    assert done.status == 1
    assert "there is no run in" in done.err


def test_what_other_work_finished_is_not_left(half_done):
    """The first work, of five layers, stays where it is; one of them is made by itself."""
    run, data, _ = half_done
    run_top9(run, data, part_size=4, layers=("conv5",))
    found = status.read(str(run))
    assert {table.table: table.slices for table in found.finished} == {"top9": 1, "feature_maps": 1, "maxima": 1}
    (work,) = found.unfinished
    assert work.slices == ["conv1", "conv2", "conv3", "conv4"]


def test_a_run_in_a_bucket_takes_few_requests(half_done, s3):
    """Copied there as it is: the same status, but for the times, which are the bucket's; no part is read."""
    run, _, _ = half_done
    bucket = Location.of("s3://bucket/run")
    for path in run.rglob("*"):
        if path.is_file():
            reduce(lambda folder, name: folder / name, path.relative_to(run).parts, bucket).write(path.read_bytes())
    there, here = status.read("s3://bucket/run"), status.read(str(run))
    assert there.run == "s3://bucket/run"
    (away,), (local,) = there.unfinished, here.unfinished
    assert (away.work, away.slices, away.parts, away.parts_done) == (local.work, local.slices, 7, 3)
    assert 0 <= away.seconds_ago < 60
    assert there.model_id == here.model_id
    with s3.recorded() as requests:
        status.read("s3://bucket/run")
    assert len(requests) < 20
    assert not [request for request in requests if request.method == "GET" and "part-" in request.path]
