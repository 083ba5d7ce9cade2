"""A cluster that goes away, and nodes that do, are noticed: Ray itself would end the job, or wait, without a word."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.cluster import Resources
from tests.jobs import killing


def test_a_head_that_answers_no_more_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "_HEAD_LOOK_SECONDS", 0.05)
    head = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{head.getsockname()[1]}"
    with cluster._watched(address):
        time.sleep(0.4)
        assert capsys.readouterr().out == ""
        head.close()
        time.sleep(0.6)
    said = capsys.readouterr().out
    assert said.count(f"the head of the Ray cluster at {address} does not answer any more") == 1
    assert "give the same command again" in said


def test_a_lost_node_is_named_once_and_so_is_the_one_that_comes(monkeypatch, capsys):
    alive = [{"CPU": 0.0}, {"CPU": 2.0, "GPU": 1.0}]
    monkeypatch.setattr(cluster, "_ROOM_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(cluster, "nodes", lambda: list(alive))
    with cluster._room_watched(Resources(1, 1, 0.0), Resources(1, 2, 1.0, "big")):
        alive[1]["big"] = 1.0
        time.sleep(0.2)
        assert capsys.readouterr().out == ""
        for _ in range(2):
            lost = alive.pop()
            time.sleep(0.2)
            (line,) = capsys.readouterr().out.splitlines()
            assert line.startswith("no living node can hold a worker any more: each needs 1 CPUs and 0 GPUs; ")
            assert "the cluster has 1 nodes: 0 CPUs and 0 GPUs. What is done is kept, and this job waits" in line
            assert "To stop it: Ctrl-C, and the same command later" in line
            alive.append(lost)
            time.sleep(0.2)
            assert capsys.readouterr().out == "there is room for the workers again: this job goes on\n"
        del alive[1]["big"]
        time.sleep(0.2)
        assert "each needs 2 CPUs and 1 GPUs and the resource 'big'; the cluster" in capsys.readouterr().out
    alive[1]["big"] = 1.0
    time.sleep(0.1)
    assert capsys.readouterr().out == "", "nobody looks any more"


def test_a_training_needs_all_of_its_workers(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "_ROOM_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 1.0}])
    with cluster._room_watched(Resources(2, 1, 0.0), least=2):
        time.sleep(0.1)
    assert "the living nodes can hold 1 of 2 workers any more: each needs 1 CPUs" in capsys.readouterr().out


def test_a_cluster_that_cannot_be_asked_is_no_error_of_the_job(monkeypatch, capfd):
    def gone():
        raise RuntimeError("no head")

    monkeypatch.setattr(cluster, "_ROOM_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(cluster, "nodes", gone)
    with cluster._room_watched(Resources(1, 1, 0.0)):
        time.sleep(0.1)
    assert capfd.readouterr() == ("", "")


SAID_SECONDS = 30.0
"""After the loss of the last node; docs/reliability.md says so."""
LOST = "no living node can hold a worker any more: each needs 1 CPUs and 0 GPUs; the cluster has 1 nodes: 0 CPUs"
AGAIN = "there is room for the workers again: this job goes on"


@pytest.fixture
def real_nodes():
    """A head without CPUs and one node of one."""
    made = killing.Nodes()
    made.kill_node(0)
    yield made
    made.shutdown()


def wait_for(started: killing.Started, ready: Callable[[], bool], seconds: float) -> None:
    began = time.monotonic()
    while not ready():
        started.require_alive()
        assert time.monotonic() - began < seconds, started.log.read_text()
        time.sleep(0.1)
    print(f"it took {time.monotonic() - began:.1f} s")


def lose_all(started: killing.Started, nodes: killing.Nodes, times: int = 1) -> None:
    nodes.kill_node(0)
    wait_for(started, lambda: started.log.read_text().count(LOST) == times, SAID_SECONDS)


@pytest.mark.slow
def test_a_sweep_whose_last_node_is_lost_says_so_and_goes_on_with_another(make_run, make_shards, real_nodes, tmp_path):
    run, data, log = make_run(), make_shards(val=[30]), tmp_path / "log"
    given = (
        "--run",
        run,
        "--data",
        data,
        "--first",
        "30",
        "--stride-px",
        "2",
        "--part-size",
        "1",
        "--workers.num",
        "1",
    )
    sweep = killing.start("occlusion", *given, "--address", real_nodes.address, log=log)
    wait_for(sweep, lambda: len(killing.committed(Path(run), "occlusion")) >= 2, 60)
    lose_all(sweep, real_nodes)
    assert AGAIN not in log.read_text()
    real_nodes.workers.append(real_nodes.add())
    wait_for(sweep, lambda: AGAIN in log.read_text(), SAID_SECONDS)
    sweep.end()
    assert log.read_text().count(LOST) == log.read_text().count(AGAIN) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_whose_last_node_is_lost_says_so_and_can_be_ended(make_shards, real_nodes, tmp_path, number):
    run, data, log = tmp_path / "run", make_shards(train=[24], val=[6]), tmp_path / "log"
    given = ("--run", run, "--data", data, "--epochs", "500", "--batch", "8", "--decoders", "0")
    steps, alone = ("--checkpoint-steps", "1"), ("--workers.num", "1")
    training = killing.start("train", *given, *steps, *alone, "--address", real_nodes.address, log=log)
    wait_for(training, lambda: killing.step(run) > 3, 90)
    lose_all(training, real_nodes)
    os.kill(training.driver.pid, number)
    training.driver.join(20)
    assert training.driver.exitcode == 128 + number, log.read_text()
    assert "; what is done is kept. To go on: " in log.read_text()
