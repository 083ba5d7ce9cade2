"""One process at a time on one piece of work; and two at once, which is a waste and nothing worse."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import uuid
from dataclasses import replace

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import derive, lease, sweep, train
from pipeline.analyses import groups, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.lease import Held, held
from pipeline.runs import Run, RunError
from pipeline.storage import Location
from tests.jobs import shell
from tests.pipeline.exact import assert_same
from tests.pipeline.test_train import options, weights


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1.0)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.3)


@pytest.fixture
def places(tmp_path):
    """The file of the lease, and where it is built."""
    return Location.of(tmp_path / "lease.json"), Location.of(tmp_path / "staging")


@pytest.fixture(params=["disk", "object store"])
def any_places(request, places):
    if request.param == "disk":
        return places
    folder = Location(pafs.PyFileSystem(pafs.FSSpecHandler(MemoryFileSystem())), f"bucket-{uuid.uuid4().hex}/work")
    return folder / "lease.json", folder / "staging"


def of_another_machine(location: Location, beats: int = 0) -> None:
    other = {"holder": "other", "host": "node-7", "process": 12, "machine": ["node-7"], "beats": beats}
    location.write(json.dumps(other).encode())


def hold_until_killed(path: str, staging: str) -> None:
    with held(Location.of(path), Location.of(staging), "top9"):
        time.sleep(60)


@pytest.fixture
def holder(places, tmp_path):
    """Another process that holds the lease."""
    process = shell.PROCESSES.Process(target=hold_until_killed, args=[str(place) for place in places], daemon=True)
    process.start()
    while not places[0].exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def test_a_lease_is_gone_with_its_holder(any_places):
    with held(*any_places, "top9"):
        assert any_places[0].exists()
        time.sleep(0.35)
        assert json.loads(any_places[0].read())["beats"] >= 2
    assert not any_places[0].exists()


def test_a_dead_process_of_this_machine_holds_nothing(places, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    began = time.monotonic()
    with held(*places, "top9"):
        assert json.loads(places[0].read())["process"] == os.getpid()
    assert time.monotonic() - began < 0.5


def test_a_process_that_is_stopped_is_taken_for_dead_after_a_while(places, holder, capsys):
    os.kill(holder.pid, signal.SIGSTOP)
    began = time.monotonic()
    with held(*places, "top9"):
        assert 1.0 <= time.monotonic() - began < 3
        os.kill(holder.pid, signal.SIGCONT)
        time.sleep(0.5)  # it wakes up, sees that the lease is another's, and leaves it alone
        assert json.loads(places[0].read())["process"] == os.getpid()
    assert f"process {holder.pid} on " in capsys.readouterr().out


def test_who_shows_signs_of_life_on_another_machine_is_left_alone(any_places):
    of_another_machine(any_places[0])
    threading.Timer(0.3, of_another_machine, args=[any_places[0], 1]).start()
    with (
        pytest.raises(Held, match=r"top9: process 12 on node-7 is at work on this.+command again"),
        held(*any_places, "top9"),
    ):
        pass
    assert json.loads(any_places[0].read())["beats"] == 1


def test_a_dead_holder_on_another_machine_is_taken_over_in_time(any_places, capsys):
    of_another_machine(any_places[0])
    began = time.monotonic()
    with held(*any_places, "top9"):
        assert 1.0 <= time.monotonic() - began < 2
    assert "process 12 on node-7 gave no sign of life for 1 s: taking over" in capsys.readouterr().out
    assert not any_places[0].exists()


def test_of_two_that_write_at_once_one_stays_and_nothing_breaks(any_places):
    with held(*any_places, "top9"):
        of_another_machine(any_places[0])
        time.sleep(0.3)
    assert json.loads(any_places[0].read())["host"] == "node-7"


def test_in_turn_means_one_at_a_time(any_places, capsys):
    inside, most, done = 0, 0, []

    def ask():
        nonlocal inside, most
        with held(*any_places, "top9", in_turn=True):
            inside += 1
            most = max(most, inside)
            time.sleep(0.15)
            inside -= 1
        done.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 4
    assert most == 1
    assert "is finishing top9: waiting for it" in capsys.readouterr().out
    assert not any_places[0].exists()


@pytest.mark.parametrize("left", [b"", b"[]", b"null", b'{"process": null}', b'{"beats": 3}'])
@pytest.mark.parametrize("in_turn", [False, True])
def test_what_is_no_lease_holds_nothing(any_places, left, in_turn):
    any_places[0].write(left)
    with held(*any_places, "top9", in_turn=in_turn):
        assert json.loads(any_places[0].read())["process"] == os.getpid()
    assert not any_places[0].exists()


def test_a_turn_of_a_dead_process_is_taken_over(places, holder):
    holder.kill()
    holder.join()
    with held(*places, "top9", in_turn=True):
        assert json.loads(places[0].read())["process"] == os.getpid()


def test_work_that_another_finished_and_cleared_up_is_not_brought_back(tmp_path):
    folder = Location.of(tmp_path / "work")
    with held(folder / "lease.json", folder / "staging", "top9"):
        shutil.rmtree(tmp_path / "work")
        time.sleep(0.3)
    assert not folder.exists()


# ------------------------------------------------------------------------------------------------------- two real jobs


def sweep_without_lease(run: str, data: str, start) -> None:
    lease.held = lambda *given, **options: contextlib.nullcontext()
    start.wait()
    given = Options(run=run, data=data, workers=Workers(num=0, cpus=1))
    assert sweep.run(top9.ANALYSIS, given, top9.Config(part_size=4, batch_size=2)) == 0


def train_without_lease(given: train.Options, start) -> None:
    lease.held = lambda *given, **options: contextlib.nullcontext()
    start.wait()
    assert train.run(given) == 0


def both(target, *arguments) -> None:
    """Two processes that begin in the same moment."""
    start = shell.PROCESSES.Barrier(2)
    jobs = [shell.PROCESSES.Process(target=target, args=(*arguments, start)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]


def test_two_sweeps_at_once_without_a_lease_write_the_same_bytes(make_run, make_shards, tmp_path):
    data, run, whole = make_shards(val=[60, 53, 39]), make_run(), tmp_path / "whole"
    shutil.copytree(run, whole)
    given = Options(run=str(whole), data=str(data), workers=Workers(num=0, cpus=1))
    sweep.run(top9.ANALYSIS, given, top9.Config(part_size=4, batch_size=2))
    both(sweep_without_lease, str(run), str(data))
    assert_same(run, whole, "top9", "feature_maps", "maxima")
    assert not [path for path in run.rglob("*") if path.name.startswith(".tmp-")]


def sweep_of(k: int, run: str, data: str, start) -> None:
    start.wait()
    given = Options(run=run, data=data, workers=Workers(num=0, cpus=1))
    with contextlib.suppress(RunError, Held):
        sweep.run(top9.ANALYSIS, given, top9.Config(part_size=4, batch_size=2, k=k))


def test_of_two_sweeps_at_once_with_other_options_one_makes_the_tables(make_run, make_shards, tmp_path):
    """Bit for bit, whichever it is: never a file of one under a manifest of the other."""
    data, run = make_shards(val=[20]), make_run()
    given = Options(run=str(run), data=str(data), workers=Workers(num=0, cpus=1))
    for k in (9, 5):
        shutil.copytree(run, tmp_path / str(k))
        alone = replace(given, run=str(tmp_path / str(k)))
        sweep.run(top9.ANALYSIS, alone, top9.Config(part_size=4, batch_size=2, k=k))
    start = shell.PROCESSES.Barrier(2)
    jobs = [shell.PROCESSES.Process(target=sweep_of, args=(k, str(run), str(data), start)) for k in (9, 5)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    k = next(iter(Run.at(str(run)).manifest("top9").values()))["fingerprint"]["k"]
    assert_same(run, tmp_path / str(k), "top9", "feature_maps", "maxima")
    assert sweep.run(top9.ANALYSIS, given, top9.Config(part_size=4, batch_size=2, k=k)) == 0
    assert not (run / "unfinished").exists() or not list((run / "unfinished").rglob("*.parquet"))


def derive_groups(run: str, start) -> None:
    start.wait()
    assert derive.run(groups.ANALYSIS, derive.Options(run=run), groups.Config()) == 0


def test_two_derived_tables_at_once_are_one(make_run, make_shards, tmp_path):
    data, run = make_shards(val=[20]), make_run()
    given = Options(run=str(run), data=str(data), workers=Workers(num=0, cpus=1))
    sweep.run(top9.ANALYSIS, given, top9.Config(part_size=4, batch_size=2))
    shutil.copytree(run, tmp_path / "whole")
    derive.run(groups.ANALYSIS, derive.Options(run=str(tmp_path / "whole")), groups.Config())
    for _ in range(3):
        both(derive_groups, str(run))
        assert_same(run, tmp_path / "whole", "groups")
        shutil.rmtree(run / "results" / "groups")
        shutil.rmtree(run / "results" / "manifests" / "groups")
    assert not (run / "unfinished" / "groups").exists()


def test_two_trainings_at_once_without_a_lease_give_the_same_model(make_shards, tmp_path):
    data = make_shards(train=[40], val=[6])
    shared = {"epochs": 6, "checkpoint_steps": 2}
    train.run(options(tmp_path / "whole", data, **shared))
    both(train_without_lease, options(tmp_path / "run", data, **shared))
    assert weights(tmp_path / "run").model_id == weights(tmp_path / "whole").model_id
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith((".tmp-", "step-"))]


def test_a_training_is_held_like_a_sweep(make_shards, tmp_path):
    given = options(tmp_path / "run", make_shards(train=[16], val=[3]), epochs=1)
    folder = Run.at(given.run).training
    with (
        held(folder / "lease.json", folder, "train"),
        pytest.raises(Held, match="train: process .+ is at work on this"),
    ):
        train.run(given)
    assert train.run(given) == 0
    assert not folder.exists()


def test_the_second_job_says_who_is_at_work_and_ends_with_its_own_status(make_run, make_shards):
    data, run = make_shards(val=[60]), make_run()
    slow = ("--run", run, "--data", data, "--workers.num", 0, "--part-size", 1, "--first", 60, "--stride-px", 1)
    first = threading.Thread(target=shell.run, args=("occlusion", *slow))
    first.start()
    while not (found := list(run.glob("unfinished/occlusion/*/lease.json"))):
        time.sleep(0.01)
    who = json.loads(found[0].read_text())
    try:
        done = shell.run("occlusion", *slow)
        assert done.status == 4, done.out + done.err
        assert f"error: occlusion: process {who['process']} on {who['host']} is at work on this" in done.err
        assert json.loads(found[0].read_text())["holder"] == who["holder"]
        other = shell.run("occlusion", *slow[:-1], 2)
        assert other.status == 4, other.out + other.err
        assert f"error: occlusion with other options: process {who['process']} on" in other.err
    finally:
        os.kill(who["process"], signal.SIGKILL)
        first.join()
