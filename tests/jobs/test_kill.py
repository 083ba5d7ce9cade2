"""The kill matrix: any process of a job dies at any moment, and the finished tables are the same, bit for bit.

KILL_SEED=N draws the same moments again.
"""

import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.box_loop import BACKGROUND
from pipeline.indexing import index_shards
from pipeline.runs import Run
from tests.conftest import CLASSES, random_model, samples
from tests.jobs import shell
from tests.jobs.killing import (
    SEED,
    Moment,
    Nodes,
    called,
    committed,
    family,
    kill_at,
    results,
    start,
    step,
    survivors,
    wait_until_gone,
)
from tests.pipeline.boxed import save_network
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
    after: str | None = None
    """The job whose table it reads."""
    network: str = "zfnet"
    """The run that it is of: a network that classifies, or one that finds boxes."""

    def command(self, run: Path, data: Path, *more: object) -> tuple[object, ...]:
        return ("--run", run, "--data", data, "--max-skipped", 0.1, *self.arguments, *more)


SWEEPS = {
    sweep.job: sweep
    for sweep in (
        Sweep("top9", ("top9", "feature_maps", "maxima"), ("--part-size", 4, "--batch-size", 2), "feature_maps"),
        Sweep("deconv", ("deconv",), ("--part-size", 4, "--batch-size", 2), "deconv", after="top9"),
        Sweep("occlusion", ("occlusion",), ("--part-size", 1, "--first", 25, "--stride-px", 8), "occlusion"),
        Sweep(
            "evaluate",
            ("predictions", "confusion", "class_errors", "evaluation"),
            ("--part-size", 4, "--batch-size", 2),
            "predictions",
        ),
        Sweep("features", ("features",), ("--part-size", 4, "--batch-size", 2), "features"),
        Sweep("invariance", ("invariance",), ("--part-size", 1, "--first", 25), "invariance"),
        Sweep(
            "correspondence",
            ("correspondence", "correspondence_pairs", "correspondence_images"),
            ("--part-size", 2, "--first", 40, "--mask-px", 11, "--random", 1),
            "correspondence_images",
        ),
        Sweep(
            "object_occlusion",
            ("object_occlusion",),
            ("--part-size", 1, "--per-class", 8, "--places", 2),
            "object_occlusion",
        ),
        Sweep("sanity", ("sanity",), ("--part-size", 2, "--layers", "conv5"), "sanity", after="deconv"),
        Sweep("pictures", ("pictures",), ("--part-size", 4, "--batch-size", 2), "pictures", after="top9"),
        Sweep(
            "localize",
            ("localization", "localization_images", "localization_windows"),
            ("--part-size", 4, "--scales", 1, 2),
            "localization_images",
            network="boxes",
        ),
        Sweep(
            "detect",
            ("detection", "detection_objects", "detection_windows", "detection_curves", "detection_classes"),
            ("--part-size", 4, "--scales", 1, 2),
            "detection_objects",
            network="boxes",
        ),
        Sweep(
            "dense_maps",
            ("dense_maps",),
            ("--part-size", 4, "--batch-size", 2, "--first", 60, "--scales", 1, 2),
            "dense_maps",
            network="boxes",
        ),
    )
}
TRAIN = ("--epochs", EPOCHS, "--batch", 8, "--checkpoint-steps", 2, "--workers.num", 2, "--workers.cpus", 1)
"""With two workers: the documented guarantee is the same bits on as many workers."""


@dataclass(frozen=True)
class Undisturbed:
    """Shards, of which two images are broken, and a run of each network whose sweeps nothing disturbed."""

    data: Path
    runs: dict[str, Path]
    finished: set[str] = field(default_factory=set)

    def run_of(self, sweep: Sweep) -> Path:
        """The run with this sweep's tables, which are made without Ray."""
        if sweep.after is not None:
            self.run_of(SWEEPS[sweep.after])
        run = self.runs[sweep.network]
        if sweep.job not in self.finished:
            done = shell.run(sweep.job, *sweep.command(run, self.data, "--workers.num", 0))
            assert done.status == 0, done.out + done.err
            self.finished.add(sweep.job)
        return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for shard, size in enumerate(SIZES):
        pictures = [(key, _described(key, members)) for key, members in samples(size, seed=shard)]
        write_tar(data / f"val-{shard:06d}.tar", pictures)
    write_tar(data / "train-000000.tar", samples(STEPS * 8, seed=9))
    (data / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    index_shards([str(path) for path in data.glob("*.tar")], str(data), classes=None, accept_damaged=False)
    network, run = random_model(), tmp_path_factory.mktemp("zfnet")
    preprocessing = Preprocessing(
        resize_px=network.resize_px, crop_px=network.input_px, mean=torch.full((3, 1, 1), 120.0)
    )
    Run.at(str(run)).save_model(
        network, architecture="zfnet_small", classes=CLASSES, preprocessing=preprocessing, about={}
    )
    boxes = save_network(tmp_path_factory.mktemp("boxes"), "overfeat_fast_small+boxes", (*CLASSES, BACKGROUND))
    return Undisturbed(data, {"zfnet": run, "boxes": boxes})


def _described(key, members):
    """With an object and landmarks; two of the images are cut off."""
    box = {"label": CLASSES[int(members["cls"])], "xyxy": [18, 14, 78, 70]}
    marks = {"right_eye": [[38, 30]], "left_eye": [[60, 30]], "nose": [[48, 46]]}
    described = json.dumps({"boxes": [box], "landmarks": marks, "frontal": True}).encode()
    jpg = members["jpg"][:300] if key in BROKEN else members["jpg"]
    return {**members, "jpg": jpg, "json": described}


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


def attempts(run: Path, work: str) -> dict[int, int]:
    """Of the parts that are committed: how often they were started, unless a finished job was just clearing them."""
    folder = next((run / "unfinished" / work).glob("*/attempts"), Path())
    started = {part: len(list(folder.glob(f"part-{part:06d}/*"))) for part in committed(run, work)}
    return {part: times for part, times in started.items() if times}


def check_finished(sweep: Sweep, run: Path, whole: Path, known: list[dict[int, int]]) -> None:
    """
    Args:
        known: at each kill, how often the parts that were done had been started.
    """
    name = sweep.tables[0]
    assert_same(whole, run, *sweep.tables)
    account = pd.read_parquet(run / "results" / "account").query(f"table == '{name}'").set_index("part")
    for done in known:
        assert (account.attempts[list(done)] == list(done.values())).all(), "a part that was done was done again"
    assert 1 <= len(known[0]) < len(account), "parts are done both before the first kill and after"
    manifest = next(iter(Run.at(str(run)).manifest(name).values()))
    skipped = pd.read_parquet(run / "results" / "skipped").query(f"table == '{name}'")
    assert account.samples.sum() == manifest["samples"]
    assert account.skipped.sum() == sum(manifest["skipped"].values()) == len(skipped)
    seen = pd.read_parquet(run / "results" / sweep.seen)
    read = seen.images.max() if "images" in seen else seen.key.nunique()
    assert read + len(skipped) == manifest["samples"]
    assert not list((run / "unfinished").glob("*"))
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name]


def drawn(*kills: str, of: str) -> list[tuple[str, Moment]]:
    """Victims with their moments, in the order of the run: `VICTIM` while parts are done, `VICTIM-end` after."""
    stages = [kill.partition("-")[2] or "parts" for kill in kills]
    moments = [
        Moment.drawn(stage, of, number, kill) for number, (kill, stage) in enumerate(zip(kills, stages, strict=True))
    ]
    moments.sort(key=lambda moment: (moment.stage == "end", moment.share))
    return [(kill.partition("-")[0], moment) for kill, moment in zip(kills, moments, strict=True)]


def survives(sweep: Sweep, kills: list[tuple[str, Moment]], undisturbed, tmp_path, nodes) -> None:
    """Kill processes of a job one after another, each time have it finished or give it again, compare."""
    whole, data = undisturbed.run_of(sweep), undisturbed.data
    run, log, name = fresh(sweep, whole, tmp_path), tmp_path / "log", sweep.tables[0]
    known: list[dict[int, int]] = []

    def begin():
        place = ("--workers.num", 2, "--address", nodes.address) if nodes else ("--workers.num", 1)
        return start(sweep.job, *sweep.command(run, data, "--workers.cpus", 1, *place), log=log)

    def kill() -> None:
        if victim in ("actor", "node", "lost", "head"):
            nodes.kill(victim, moment.number, b"MapWorker")
        if victim in ("driver", "head"):
            started.kill()
        known.append(attempts(run, name))

    started = begin()
    for victim, moment in kills:
        kill_at(started, reached(sweep, run, whole, moment), moment, kill)
        print(f"KILL_SEED={SEED}: {sweep.job}, {victim} killed at {moment}, {len(known[-1])} parts were done")
        check_nothing_unfinished_is_seen(sweep, run, whole)
        if victim == "driver" and nodes is None:
            print(f"its processes were gone after {wait_until_gone(started.mark):.1f} s")
        if victim == "head":  # what is left of the cluster goes on for a while, beside the job in a cluster of its own
            nodes = None
        if victim in ("driver", "head"):
            started = begin()
    started.end()
    check_finished(sweep, run, whole, known)


def test_a_sweep_survives_a_kill(undisturbed, tmp_path):
    survives(SWEEPS["top9"], drawn("driver", of="fast"), undisturbed, tmp_path, None)


ON_NODES = ("actor", "node", "driver-end")
HEAD_FIRST = ("head", "driver", "driver-end")
ON_LATER = ("actor", "driver", "driver-end")
LOST = ("lost",)  # of two workers one finds no place any more
KILLS = (
    [(job, ON_NODES) for job in ("top9", "deconv", "occlusion", "evaluate")]
    + [(job, HEAD_FIRST) for job in ("top9", "deconv", "occlusion", "features")]
    + [("top9", LOST)]
    + [(job, ON_LATER) for job in ("invariance", "correspondence", "object_occlusion", "sanity", "pictures")]
    + [(job, ON_LATER) for job in ("localize", "detect", "dense_maps")]
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("job", "kills"), [pytest.param(*case, id="-".join([case[0], *case[1]])) for case in KILLS])
def test_a_sweep_survives_any_kills(job, kills, undisturbed, tmp_path, request):
    with cluster_for(kills, request) as nodes:
        survives(SWEEPS[job], drawn(*kills, of=job), undisturbed, tmp_path, nodes)


@contextmanager
def cluster_for(kills: tuple[str, ...], request):
    """The cluster that the tests share, or one whose head may be killed, or that may stay smaller."""
    if not {"head", "lost"} & set(kills):
        yield request.getfixturevalue("nodes")
        return
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.shutdown()


# -------------------------------------------------------------------------------------------------------- of training


@pytest.fixture(scope="module")
def trained(undisturbed, tmp_path_factory):
    """A training that nothing disturbed."""
    run = tmp_path_factory.mktemp("trained")
    train(run, undisturbed.data, None, run / "log").end()
    return run


def train(run: Path, data: Path, nodes: Nodes | None, log: Path):
    place = ("--address", nodes.address) if nodes else ()
    return start("train", "--run", run, "--data", data, *TRAIN, "--decoders", 0, *place, log=log)


def learned(run: Path) -> tuple[str, list[bytes]]:
    """What must be the same: the model, and what was measured of it."""
    measured = pq.read_table(run / "metrics").drop_columns(["images_per_second", "data_wait_share", "seconds"])
    return Run.at(str(run)).describe()["model_id"], bits(measured)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [("worker", "node", "driver"), ("head", "driver", "driver-end")], ids="-".join)
def test_training_survives_any_kills(kills, undisturbed, trained, tmp_path, request):
    with cluster_for(kills, request) as nodes:
        train_survives(drawn(*kills, of="train"), undisturbed.data, tmp_path, nodes)
    run = tmp_path / "run"
    assert learned(run) == learned(trained)
    assert not [path for path in run.rglob("*") if path.name.startswith((".tmp-", "step-"))]
    assert not (run / "unfinished" / "train").exists()


def train_survives(kills: list[tuple[str, Moment]], data: Path, tmp_path: Path, nodes: Nodes | None) -> None:
    run, log, known = tmp_path / "run", tmp_path / "log", {}

    def kill() -> None:
        done = step(run)
        print(f"KILL_SEED={SEED}: train, {victim} killed at {moment}, after step {done} of {STEPS * EPOCHS}")
        epochs = [path for path in (run / "metrics").glob("epoch-*") if int(path.stem[6:]) * STEPS <= done]
        known.update({path: known.get(path, path.stat().st_mtime_ns) for path in epochs})
        if victim in ("worker", "node", "head"):
            nodes.kill(victim, moment.number, b"RayTrainWorker")
        if victim in ("driver", "head"):
            started.kill()

    def reached() -> bool:
        if moment.stage == "end":
            return (run / "model" / "weights.safetensors").exists()
        return step(run) >= 1 + int(moment.share * (STEPS * EPOCHS - 10))

    started = train(run, data, nodes, log)
    for victim, moment in kills:
        kill_at(started, reached, moment, kill)
        if victim == "head":
            nodes = None
        if victim in ("driver", "head"):
            started = train(run, data, nodes, log)
    started.end()
    assert all(path.stat().st_mtime_ns == written for path, written in known.items()), "an epoch was trained again"


# --------------------------------------------------------------------------------------------------- what stays behind


WORKING_SECONDS, AGENTS_SECONDS = 30.0, 120.0
"""After a SIGKILL of the driver: until nothing works any more, and until Ray's idle agents are gone as well."""


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_behind(undisturbed, tmp_path):
    """Two idle agents of Ray wait a while for the head, which is gone."""
    sweep, moment = SWEEPS["occlusion"], Moment.drawn("parts", "agents")
    whole, data = undisturbed.run_of(sweep), undisturbed.data
    run = fresh(sweep, whole, tmp_path)
    started = start("occlusion", *sweep.command(run, data, "--workers.num", 1), log=tmp_path / "log")
    known: dict[int, str] = {}

    def kill() -> None:
        known.update(family(started.driver.pid))
        started.kill()

    kill_at(started, reached(sweep, run, whole, moment), moment, kill)
    assert len(known) > 4, "its own cluster's processes are all below the driver"
    began, working, seconds = time.monotonic(), 0.0, 0.0
    while left := survivors(known):
        seconds = time.monotonic() - began
        if any(b"Agent" not in called(pid) for pid in left):
            working = seconds
        assert working < WORKING_SECONDS
        assert seconds < AGENTS_SECONDS, left
        time.sleep(0.1)
    print(f"of {len(known)} processes none worked after {working:.1f} s, none was there after {seconds:.1f} s")
