"""The kill matrix: any process of a job dies at any moment, and the finished tables are the same, bit for bit.

KILL_SEED=N draws the same moments again.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.runs import Run
from pipeline.shards import index_shards
from tests.conftest import CLASSES, random_model, samples
from tests.jobs import shell
from tests.jobs.killing import (
    SEED,
    Moment,
    Nodes,
    committed,
    kill_at,
    kill_driver,
    results,
    start,
    step,
    wait_until_gone,
)
from tests.pipeline.exact import assert_same, bits, files
from tests.tars import write_tar
from zfnet.images import Preprocessing

SIZES = [61, 42, 29]
BROKEN = {"s0-0007", "s1-0011"}
STEPS, EPOCHS = 15, 4  # of training: 120 images by 8
PARTS_LEFT = 3  # a kill while parts are done leaves at least so many


@dataclass(frozen=True)
class Sweep:
    """A sweep to be killed: what it writes, and how small it is made."""

    job: str
    tables: tuple[str, ...]
    """The first is the name of its work."""
    arguments: tuple[object, ...]
    seen: str
    """A table that says how many samples were read: a row each, or its column `images`."""

    def command(self, run: Path, data: Path, *more: object) -> tuple[object, ...]:
        return ("--run", run, "--data", data, "--max-skipped", 0.1, *self.arguments, *more)


SWEEPS = {
    sweep.job: sweep
    for sweep in (
        Sweep("top9", ("top9", "feature_maps", "maxima"), ("--part-size", 4, "--batch-size", 2), "feature_maps"),
        Sweep("deconv", ("deconv",), ("--part-size", 4, "--batch-size", 2), "deconv"),
        Sweep("occlusion", ("occlusion",), ("--part-size", 1, "--first", 25, "--stride-px", 8), "occlusion"),
        Sweep(
            "evaluate",
            ("predictions", "confusion", "class_errors", "evaluation"),
            ("--part-size", 4, "--batch-size", 2),
            "predictions",
        ),
        Sweep("features", ("features",), ("--part-size", 4, "--batch-size", 2), "features"),
    )
}
TRAIN = ("--epochs", EPOCHS, "--batch", 8, "--checkpoint-steps", 2, "--workers.num", 2, "--workers.cpus", 1)
"""With two workers: the documented guarantee is the same bits on as many workers."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run with all sweeps finished, without Ray, and its shards, of which two images are broken."""
    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("undisturbed")
    for shard, size in enumerate(SIZES):
        pictures = [(key, _broken(key, members)) for key, members in samples(size, seed=shard)]
        write_tar(data / f"val-{shard:06d}.tar", pictures)
    write_tar(data / "train-000000.tar", samples(STEPS * 8, seed=9))
    (data / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(path) for path in data.glob("*.tar")], str(data), classes=None, accept_damaged=False)
    network = random_model()
    preprocessing = Preprocessing(
        resize_px=network.resize_px, crop_px=network.input_px, mean=torch.full((3, 1, 1), 120.0)
    )
    Run.at(str(run)).save_model(
        network, architecture="zfnet_small", classes=CLASSES, preprocessing=preprocessing, about={}
    )
    for sweep in SWEEPS.values():
        done = shell.run(sweep.job, *sweep.command(run, data, "--workers.num", 0))
        assert done.status == 0, done.out + done.err
    return run, data


def _broken(key, members):
    return {**members, "jpg": members["jpg"][:300]} if key in BROKEN else members


@pytest.fixture(scope="module")
def nodes():
    """A cluster that jobs join, whose actors and nodes are killed."""
    found = Nodes()
    yield found
    found.shutdown()


# ---------------------------------------------------------------------------------------------------------- of sweeps


def fresh(sweep: Sweep, whole: Path, tmp_path: Path) -> Path:
    """The undisturbed run without what this job made."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in results(run, sweep.tables):
        path.unlink()
    for table in sweep.tables:
        shutil.rmtree(run / "results" / table)
        shutil.rmtree(run / "results" / "manifests" / table)
    return run


def reached(sweep: Sweep, run: Path, whole: Path, moment: Moment) -> bool:
    name = sweep.tables[0]
    parts = len(pd.read_parquet(whole / "results" / "account", filters=[("table", "==", name)]))
    if moment.stage == "parts":
        least = 1 + int(moment.share * (parts - PARTS_LEFT - 1))
        return lambda: len(committed(run, name)) >= least
    least = int(moment.share * len(results(whole, sweep.tables)))
    return lambda: len(committed(run, name)) == parts and len(results(run, sweep.tables)) >= least


def check_nothing_unfinished_is_seen(sweep: Sweep, run: Path, whole: Path) -> None:
    """What pandas finds after a kill is finished: the very rows of the undisturbed run."""
    for table in sweep.tables:
        if (run / "results" / table).exists():
            pd.read_parquet(run / "results" / table)
            for name, rows in files(run, table).items():
                assert bits(rows) == bits(pq.read_table(whole / "results" / table / name)), (table, name)


def check_finished(sweep: Sweep, run: Path, whole: Path, before: set[str], moment: Moment) -> None:
    name = sweep.tables[0]
    assert_same(whole, run, *sweep.tables)
    account = pd.read_parquet(run / "results" / "account").query(f"table == '{name}'")
    done = account[[f"part-{part:06d}.parquet" in before for part in account.part]]
    assert (done.attempts == 1).all(), "a part that was done was done again"
    assert (1 <= len(done) < len(account)) if moment.stage == "parts" else (account.attempts == 1).all()
    manifest = next(iter(Run.at(str(run)).manifest(sweep.tables[0]).values()))
    skipped = pd.read_parquet(run / "results" / "skipped").query(f"table == '{name}'")
    assert account.samples.sum() == manifest["samples"]
    assert account.skipped.sum() == sum(manifest["skipped"].values()) == len(skipped)
    seen = pd.read_parquet(run / "results" / sweep.seen)
    read = seen.images.max() if "images" in seen else seen.key.nunique()
    assert read + len(skipped) == manifest["samples"]
    assert not list((run / "unfinished").glob("*"))
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name]


def survives(sweep: Sweep, victim: str, moment: Moment, undisturbed, tmp_path, request) -> None:
    """Kill one process of a job at one moment, have it finished, compare."""
    whole, data = undisturbed
    run, log = fresh(sweep, whole, tmp_path), tmp_path / "log"
    nodes = Nodes() if victim == "head" else request.getfixturevalue("nodes") if victim != "driver" else None
    address = ("--address", nodes.address) if nodes else ()
    given = sweep.command(run, data, "--workers.cpus", 1, "--workers.num", 2 if nodes else 1)
    started = start(sweep.job, *given, *address, log=log)
    before: set[str] = set()

    def kill() -> None:
        before.update(committed(run, sweep.tables[0]))
        if victim == "actor":
            nodes.kill_worker(b"MapWorker", moment.number)
        elif victim == "node":
            nodes.kill_node(moment.number)
        else:
            if victim == "head":
                nodes.kill_head()
            kill_driver(started)

    kill_at(started, reached(sweep, run, whole, moment), moment, kill)
    print(f"KILL_SEED={SEED}: {sweep.job}, {victim} killed at {moment}, {len(before)} parts were done")
    check_nothing_unfinished_is_seen(sweep, run, whole)
    if victim in ("actor", "node"):
        started.end()
    elif victim == "driver":
        print(f"its processes were gone after {wait_until_gone(started.mark):.1f} s")
        start(sweep.job, *given, log=log).end()
    else:  # what is left of the old cluster goes on for a while, beside the job that is run again in one of its own
        start(sweep.job, *sweep.command(run, data, "--workers.num", 1, "--workers.cpus", 1), log=log).end()
        nodes.shutdown()
    check_finished(sweep, run, whole, before, moment)


def test_a_sweep_survives_a_kill(undisturbed, tmp_path, request):
    survives(SWEEPS["top9"], "driver", Moment.drawn("fast", "parts"), undisturbed, tmp_path, request)


VICTIMS = ("actor", "node", "driver", "head")
KILLS = [
    *(
        (job, victim, "parts")
        for job in ("top9", "deconv", "occlusion")
        for victim in ("actor", "node", "driver", "head")
    ),
    *((job, "driver", "end") for job in SWEEPS),
    ("top9", "head", "end"),
    ("evaluate", "actor", "parts"),
    ("evaluate", "head", "parts"),
    ("features", "node", "parts"),
    ("features", "driver", "parts"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("job", "victim", "stage"), KILLS)
def test_a_sweep_survives_any_kill(job, victim, stage, undisturbed, tmp_path, request):
    survives(SWEEPS[job], victim, Moment.drawn(job, victim, stage), undisturbed, tmp_path, request)


# -------------------------------------------------------------------------------------------------------- of training


@pytest.fixture(scope="module")
def trained(undisturbed, nodes, tmp_path_factory):
    """A training that nothing disturbed."""
    run = tmp_path_factory.mktemp("trained")
    train(run, undisturbed[1], nodes, run / "log").end()
    return run


def train(run: Path, data: Path, nodes: Nodes, log: Path):
    return start("train", "--run", run, "--data", data, *TRAIN, "--decoders", 0, "--address", nodes.address, log=log)


def learned(run: Path) -> tuple[str, list[bytes]]:
    """What must be the same: the model, and what was measured of it."""
    measured = pq.read_table(run / "metrics").drop_columns(["images_per_second", "data_wait_share", "seconds"])
    return Run.at(str(run)).describe()["model_id"], bits(measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "stage"),
    [("worker", "parts"), ("node", "parts"), ("driver", "parts"), ("driver", "end"), ("head", "parts")],
)
def test_training_survives_any_kill(victim, stage, undisturbed, trained, tmp_path, request):
    data, run, moment = undisturbed[1], tmp_path / "run", Moment.drawn("train", victim, stage)
    nodes = Nodes() if victim == "head" else request.getfixturevalue("nodes")
    started = train(run, data, nodes, tmp_path / "log")
    least = 1 + int(moment.share * (STEPS * EPOCHS - 10))
    seen = []

    def kill() -> None:
        seen.append(step(run))
        if victim == "worker":
            nodes.kill_worker(b"RayTrainWorker", moment.number)
        elif victim == "node":
            nodes.kill_node(moment.number)
        else:
            if victim == "head":
                nodes.kill_head()
            kill_driver(started)

    whole = (run / "model" / "weights.safetensors").exists
    kill_at(started, (lambda: step(run) >= least) if stage == "parts" else whole, moment, kill)
    print(f"KILL_SEED={SEED}: train, {victim} killed at {moment}, after step {seen[0]} of {STEPS * EPOCHS}")
    epochs = {path: path.stat().st_mtime_ns for path in (run / "metrics").glob("epoch-*")}
    if victim in ("worker", "node"):
        started.end()
    else:
        again = Nodes() if victim == "head" else nodes
        train(run, data, again, tmp_path / "log").end()
        if victim == "head":
            again.shutdown()
            nodes.shutdown()
    assert learned(run) == learned(trained)
    whole_epochs = [path for path in epochs if int(path.stem[6:]) * STEPS <= seen[0]]
    assert all(path.stat().st_mtime_ns == epochs[path] for path in whole_epochs), "an epoch was trained again"
    assert not [path for path in run.rglob("*") if path.name.startswith((".tmp-", "step-"))]
    assert not (run / "unfinished" / "train").exists()


# --------------------------------------------------------------------------------------------------- what stays behind


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_behind(undisturbed, tmp_path, request):
    """Whatever works is gone within seconds; two idle agents of Ray, which wait for the head, within two minutes."""
    whole, data = undisturbed
    sweep, moment = SWEEPS["occlusion"], Moment.drawn("agents", "parts")
    run = fresh(sweep, whole, tmp_path)
    started = start("occlusion", *sweep.command(run, data, "--workers.num", 1), log=tmp_path / "log")
    kill_at(started, reached(sweep, run, whole, moment), moment, lambda: kill_driver(started))
    working = wait_until_gone(started.mark, 30)
    agents = wait_until_gone(started.mark, 120, agents=True)
    print(f"after {working:.1f} s nothing worked any more, after {working + agents:.1f} s nothing was there")
