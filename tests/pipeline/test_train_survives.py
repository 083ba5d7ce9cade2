"""Training through SIGKILL of the driver, of a worker and of a node, and through a change of the number of workers.

The moments are drawn from a printed seed. What is compared is the whole model, bit for bit, wherever the number of
workers stayed the same.
"""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from pipeline import checkpoints, metrics, train
from pipeline.cluster import TrainingFailed, Workers
from pipeline.loop import Plan, Trainer
from pipeline.runs import Run
from tests.conftest import ROOT
from tests.jobs.killing import SEED, alive, below, wait_until_gone
from tests.jobs.killing import step as step_of
from tests.pipeline.test_train import options, weights

STEPS = 25  # of an epoch: 200 images by 8
SETTINGS = ["--epochs", "4", "--batch", "8", "--checkpoint-steps", "3", "--workers.cpus", "1", "--decoders", "0"]
ENDLESS = 10_000  # epochs of the elastic training: it lasts until Ray Train has seen the new node, however slow that is


def command(run: Path, data: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs/train.py"), "--run", str(run), "--data", str(data), *SETTINGS, *more]


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while step_of(run) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.002)


def kill_worker() -> int:
    """SIGKILL one training worker of this process's cluster."""
    found = [pid for pid, name in below(os.getpid()).items() if b"RayTrainWorker" in name]
    assert found, "there is no training worker"
    os.kill(found[0], signal.SIGKILL)
    return found[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_inside_an_epoch_change_no_bit(make_shards, tmp_path, workers):
    """The driver alone is killed, then in a second epoch all that belongs to the job at once, as if the power went."""
    data, run, whole = make_shards(train=[200], val=[6]), tmp_path / "run", tmp_path / "whole"
    number = ("--workers.num", str(workers))
    finish(command(whole, data, *number))
    rng = random.Random(SEED + workers)
    for epoch, all_at_once in ((0, False), (2, True)):
        step = epoch * STEPS + rng.randint(1, 15)
        print(f"seed {SEED}: killed after step {step}")
        mark = uuid.uuid4().hex
        driver = subprocess.Popen(
            command(run, data, *number),
            env={**os.environ, "KILL_TEST": mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(run, step)
        time.sleep(rng.uniform(0, 0.1))
        for process in alive(mark) if all_at_once else [driver.pid]:
            os.kill(process, signal.SIGKILL)
        driver.wait()
        wait_until_gone(mark)
        assert not (run / "run.json").exists()
    assert checkpoints.newest(Run.at(str(run))).startswith("step-")
    finish(command(run, data, *number))
    assert weights(run).model_id == weights(whole).model_id


@pytest.mark.slow
def test_a_worker_killed_inside_an_epoch_changes_no_bit(make_shards, tmp_path, ray_cluster):
    """Ray Train starts the group again, the loop goes on from the newest checkpoint."""
    data, run, whole = make_shards(train=[200], val=[6]), tmp_path / "run", tmp_path / "whole"
    shared = {"epochs": 4, "checkpoint_steps": 3, "workers": Workers(num=2, cpus=1)}
    train.run(options(whole, data, **shared))
    step = STEPS + random.Random(SEED).randint(1, 15)
    print(f"seed {SEED}: killed after step {step}")
    killed = []

    def kill():
        wait_for(run, step)
        killed.append(kill_worker())

    thread = threading.Thread(target=kill)
    thread.start()
    assert train.run(options(run, data, **shared)) == 0
    thread.join()
    assert killed
    assert pd.read_parquet(run / "metrics").epoch.tolist() == [1, 2, 3, 4]
    assert weights(run).model_id == weights(whole).model_id


@pytest.mark.slow
def test_a_death_more_than_allowed_ends_the_call_and_the_next_goes_on(make_shards, tmp_path, ray_cluster):
    data, run = make_shards(train=[200], val=[6]), tmp_path / "run"
    shared = {"epochs": 4, "checkpoint_steps": 3, "workers": Workers(num=2, cpus=1)}

    def kill():
        wait_for(run, STEPS + 4)
        kill_worker()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(TrainingFailed):
        train.run(options(run, data, **shared, failures=0))
    thread.join()
    assert checkpoints.newest(Run.at(str(run))) is not None
    assert train.run(options(run, data, **shared, failures=0)) == 0
    assert pd.read_parquet(run / "metrics").epoch.tolist() == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------- the number of workers


class Stops(Trainer):
    """Stops after the checkpoint of one step."""

    stop: int

    def _checkpoint(self, *, inside):
        super()._checkpoint(inside=inside)
        if self.step == self.stop:
            raise KeyboardInterrupt


def one_rank(plan: Plan, rank: int, world: int, stop: int, meeting: Path) -> None:
    """What one worker does, with gloo between them and no Ray."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    trainer = Stops(plan, rank=rank, world=world, device="cpu", decoders=0, checkpoint_steps=2, keep_epochs=())
    trainer.stop = stop
    try:
        trainer.run()
    except KeyboardInterrupt:
        pass
    finally:
        dist.destroy_process_group()


def train_some(given: train.Options, world: int, stop: int) -> None:
    """Train to the checkpoint at step `stop` (0: to the end) on so many workers."""
    plan, directory = train._plan(given), Run.at(given.run)
    train._claim(directory, plan)
    meeting = Path(given.run) / f"meeting-{uuid.uuid4().hex}"
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=one_rank, args=(plan, rank, world, stop, meeting)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0


@pytest.mark.parametrize("worlds", [(2, 1), (1, 3)])
def test_another_number_of_workers_goes_on_at_the_same_sample(make_shards, tmp_path, worlds):
    """float64, dropout off: the weights after three epochs of three steps, changed inside the second."""
    data = make_shards(train=[20, 7], val=[5])
    exact = {"precision": "float64", "dropout": 0.0, "checkpoint_steps": 2}
    whole, changed = options(tmp_path / "whole", data, **exact), options(tmp_path / "changed", data, **exact)
    assert train.run(whole) == 0
    train_some(changed, worlds[0], stop=4)
    assert checkpoints.newest(Run.at(changed.run)) == "step-00000004"
    train_some(changed, worlds[1], stop=0)
    one, two = (checkpoints.read(Run.at(given.run), "epoch-0003").tensors for given in (whole, changed))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-9)
    assert one["conv1.weight"].dtype == torch.float64
    losses = [pd.read_parquet(Path(given.run) / "metrics").train_loss for given in (whole, changed)]
    pd.testing.assert_series_equal(*losses, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_elastic_training_loses_a_node_and_gets_another(make_shards, tmp_path):
    """Two nodes of one CPU; one is killed inside an epoch, another comes later: training goes on with what there is."""
    from ray.cluster_utils import Cluster

    data, run, whole = make_shards(train=[200], val=[6]), tmp_path / "run", tmp_path / "whole"
    exact = {"precision": "float64", "dropout": 0.0, "schedule": "plateau"}
    assert train.run(options(whole, data, **exact, epochs=5)) == 0
    more = ("--precision", "float64", "--dropout", "0", "--schedule", "plateau", "--epochs", str(ENDLESS))
    elastic = ("--workers.num", "2", "--min-workers", "1")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 2**27}
    )
    try:
        lost, _ = (cluster.add_node(num_cpus=1, object_store_memory=2**27) for _ in range(2))
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(
                [*command(run, data, *more, *elastic), "--address", cluster.address], stdout=log, stderr=log
            )
        wait_for(run, STEPS + 3)
        cluster.remove_node(lost, allow_graceful=False)
        print(f"an epoch on one worker is done {wait_for_groups(driver, run, [2, 1]):.0f} s after the loss")
        cluster.add_node(num_cpus=1, object_store_memory=2**27)
        print(f"an epoch on two is done {wait_for_groups(driver, run, [2, 1, 2]):.0f} s after another node came")
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == 130, (tmp_path / "log").read_text()
    finally:
        cluster.shutdown()
    found = metrics.read(Run.at(str(run))).to_pandas()
    assert found.epoch.tolist() == list(range(1, len(found) + 1))
    assert (found.train_samples == 200).all()
    undisturbed = pd.read_parquet(whole / "metrics")
    for loss in ("train_loss", "validation_loss"):
        pd.testing.assert_series_equal(found[loss][:5], undisturbed[loss], rtol=0, atol=1e-9)


def wait_for_groups(driver: subprocess.Popen, run: Path, expected: list[int]) -> float:
    """Seconds until the epochs were done by groups of so many workers, one group after another."""
    began = time.monotonic()
    while (found := groups(run)) != expected:
        assert driver.poll() is None, "it ended too early"
        assert time.monotonic() - began < 200, found
        time.sleep(0.2)
    return time.monotonic() - began


def groups(run: Path) -> list[int]:
    """The numbers of workers that epochs were done by."""
    return [workers for workers, _ in itertools.groupby(metrics.read(Run.at(str(run)))["workers"].to_pylist())]
