"""A part that kills its worker again and again: it alone is given up, all others are done, and nothing hangs."""

import shutil
import signal

import pandas as pd
import pytest

from pipeline import sweep
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from tests.jobs import shell
from tests.pipeline import poison
from tests.pipeline.exact import assert_same

SIZES = [20, 13, 9]  # at part size 4: 5 + 4 + 3 parts
PARTS = 12
LETHAL = "s1-0005"  # of part 6


def run_job(run, data, *, workers=2, attempts=1, given_up="retry", analysis=poison.ANALYSIS):
    options = Options(
        run=str(run), data=str(data), workers=Workers(num=workers, cpus=1), attempts=attempts, given_up=given_up
    )
    return sweep.run(analysis, options, top9.Config(part_size=4, batch_size=2, layers=("conv2", "conv5")))


def committed(run):
    return {int(path.stem[5:]) for path in (run / "unfinished" / "top9").glob("*/parts/*")}


@pytest.fixture
def undisturbed(make_run, make_shards, tmp_path):
    """A run without results, its shards, and what its tables should be."""
    data, run, whole = make_shards(val=SIZES), make_run(), tmp_path / "whole"
    shutil.copytree(run, whole)
    run_job(whole, data, workers=0)
    return run, data, whole


def check_given_up_and_tried_again(undisturbed, capsys, workers, attempts):
    run, data, whole = undisturbed
    (run / "poison").write_text(LETHAL)
    died = f"its worker died {attempts} times while it did nothing else"
    with pytest.raises(SweepFailed, match=rf"given up: part 6 \({died}\).+4 images.+same command tries again"):
        run_job(run, data, workers=workers, attempts=attempts)
    assert committed(run) == set(range(PARTS)) - {6}
    assert not (run / "results" / "top9").exists()
    skipped = pd.read_parquet(run / "results" / "skipped")
    assert skipped.key.tolist() == [f"s1-000{i}" for i in (4, 5, 6, 7)]
    assert set(skipped.reason) == {"worker_died"}
    (run / "poison").unlink()
    assert run_job(run, data, workers=workers, attempts=attempts) == 0
    said = capsys.readouterr().out
    assert f"part 6 was given up by an earlier call ({died}): it is tried again" in said
    assert f"1 of {PARTS} parts to do" in said
    assert_same(run, whole, "top9", "feature_maps")
    account = pd.read_parquet(run / "results" / "account").set_index("part")
    # Once beside others, so often alone, once to see that it is enough; then in the second call.
    assert account.attempts[6] == 1 + attempts + 1 + 1
    assert account.attempts.drop(6).max() <= 2
    assert pd.read_parquet(run / "results" / "skipped").empty


def test_the_part_that_kills_its_worker_is_given_up_and_no_other(undisturbed, ray_cluster, capsys):
    check_given_up_and_tried_again(undisturbed, capsys, workers=2, attempts=1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_it_is_given_up_with_any_number_of_workers(undisturbed, ray_cluster, capsys, workers):
    check_given_up_and_tried_again(undisturbed, capsys, workers, attempts=3)


@pytest.mark.slow
def test_its_images_can_be_skipped(undisturbed, ray_cluster, capsys):
    run, data, _ = undisturbed
    (run / "poison").write_text(LETHAL)
    assert run_job(run, data, given_up="skip") == 3
    assert "4 of 42 samples skipped (4 worker_died)" in capsys.readouterr().out
    skipped = pd.read_parquet(run / "results" / "skipped")
    assert skipped.key.tolist() == [f"s1-000{i}" for i in (4, 5, 6, 7)]
    assert set(skipped.detail) == {"its worker died 1 times while it did nothing else"}
    maps = pd.read_parquet(run / "results" / "feature_maps")
    assert set(maps.images) == {42 - 4}
    account = pd.read_parquet(run / "results" / "account")
    assert (account.samples.sum(), account.skipped.sum()) == (42, 4)
    assert not (run / "unfinished" / "top9").exists()


def test_without_ray_all_other_parts_are_done_first(undisturbed, tmp_path, capsys):
    """There the job itself dies; given again it leaves the suspects for the end, and it can leave them out."""
    run, data, whole = undisturbed
    (run / "poison").write_text(LETHAL)
    for _ in range(3):  # the first death may leave a part that was done beside it, which the third call does first
        job = shell.PROCESSES.Process(target=run_job, args=(run, data), kwargs={"workers": 0})
        job.start()
        job.join()
        assert job.exitcode == -signal.SIGKILL
    assert committed(run) == set(range(PARTS)) - {6}
    shutil.copytree(run, tmp_path / "without")
    (run / "poison").unlink()
    assert run_job(run, data, workers=0) == 0
    assert_same(run, whole, "top9", "feature_maps")
    (work,) = (tmp_path / "without" / "unfinished" / "top9").iterdir()
    (work / "given_up").mkdir()
    (work / "given_up" / "part-000006.json").write_text('"its worker died"')
    assert run_job(tmp_path / "without", data, workers=0, given_up="skip") == 3
    said = capsys.readouterr().out
    assert "part 6 was given up by an earlier call (its worker died): its images are skipped" in said
    assert "4 of 42 samples skipped (4 worker_died)" in said


def test_workers_that_die_while_they_start_end_the_job(undisturbed, ray_cluster):
    run, data, whole = undisturbed
    (run / "poisoned-network").write_text("all")
    with pytest.raises(SweepFailed, match="workers die again and again while they load the network"):
        run_job(run, data, workers=1)
    (run / "poisoned-network").unlink()
    assert run_job(run, data, workers=0) == 0
    assert_same(run, whole, "top9", "feature_maps")
