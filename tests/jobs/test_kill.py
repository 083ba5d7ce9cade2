"""SIGKILL of the driver in the middle of each sweep, then the same command again: the same tables, bit for bit.

The moments are drawn from a printed seed over the whole run: while parts are done, in the fold, before the manifest.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.pipeline.exact import assert_same

SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
TABLES = {"top9": ("top9", "feature_maps"), "deconv": ("deconv",), "occlusion": ("occlusion",)}
SMALL = {
    "top9": ["--part-size", "4", "--batch-size", "2"],
    "deconv": ["--part-size", "2", "--batch-size", "2"],
    "occlusion": ["--part-size", "1", "--first", "12", "--stride-px", "8"],
}


def command(job: str, run: Path, data: Path) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--run", str(run), "--data", str(data), *SMALL[job]]


def finish(job: str, run: Path, data: Path, *more: str) -> str:
    done = subprocess.run([*command(job, run, data), *more], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def committed(run: Path, job: str) -> set[str]:
    return {path.name for path in (run / "unfinished" / job).glob("*/parts/part-*")}


def alive(mark: str) -> list[int]:
    """Processes of the job that could still write: they inherit its environment.

    Ray's two agents idle for another minute, telling a head that is gone of its end; they touch nothing.
    """
    found = []
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes()
            if ours and b"Agent" not in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def reached(run: Path, job: str, moment: int | str) -> bool:
    """Whether the moment to kill has come: so many parts are committed, or a file of the fold is there."""
    if isinstance(moment, int):
        return len(committed(run, job)) >= moment
    if moment == "fold":
        return (run / "results" / job).exists()
    return bool(list((run / "results" / "account").glob(f"{job}.*")))


def kill_at(job: str, run: Path, data: Path, moment: int | str) -> bool:
    """Start the job and SIGKILL its driver at the moment; False where it was finished before."""
    mark = uuid.uuid4().hex
    driver = subprocess.Popen(
        command(job, run, data),
        env={**os.environ, "KILL_TEST": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while driver.poll() is None and not reached(run, job, moment):
        time.sleep(0.002)
    finished = driver.poll() is not None
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 60
    while alive(mark):
        assert time.monotonic() < deadline, "processes of a killed job are still there after 60 s"
        time.sleep(0.1)
    return not finished


def check(job: str, moment: int | str, whole: Path, data: Path, tmp_path: Path) -> None:
    """Kill one job at one moment, run it again, compare."""
    print(f"seed {SEED}: {job} killed at {moment}")
    run = tmp_path / f"{job}-{moment}"
    shutil.copytree(whole, run)
    manifests = [run / "results" / "manifests" / table for table in TABLES[job]]
    for path in [*manifests, *(run / "results" / table for table in TABLES[job])]:
        shutil.rmtree(path)
    for kind in ("account", "skipped"):
        for path in (run / "results" / kind).glob(f"{job}.*"):
            path.unlink()
    assert kill_at(job, run, data, moment), "the job was finished before it could be killed"
    before = committed(run, job)
    text = finish(job, run, data)
    assert_same(whole, run, *TABLES[job])
    account = pd.read_parquet(run / "results" / "account").query(f"table == '{job}'")
    assert account.samples.sum() == json.loads(next(manifests[0].iterdir()).read_text())["samples"]
    done = account[[f"part-{part:06d}.parquet" in before for part in account.part]]
    assert (done.attempts == 1).all(), "a part that was done was done again"
    if isinstance(moment, int):
        assert 1 <= len(done) < len(account)
        assert "finished in" in text
    else:  # all parts were done; after the last manifest only the clearing up was left
        assert (account.attempts == 1).all()
        assert "finished in" in text or "finished already" in text
    assert not list((run / "unfinished").glob("*"))
    assert not [path for path in run.rglob("*") if ".tmp-" in path.name]


@pytest.fixture
def undisturbed(make_run, make_shards):
    """A run with all three sweeps finished, without Ray, and its shards."""
    data, run = make_shards(val=[20, 13, 9]), make_run()
    for job in TABLES:
        finish(job, run, data, "--workers.num", "0")
    return run, data


def test_each_sweep_survives_a_kill(undisturbed, tmp_path):
    whole, data = undisturbed
    rng = random.Random(SEED)
    for job in TABLES:
        check(job, rng.randint(1, 5), whole, data, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_sweep_survives_kills_at_every_stage(undisturbed, tmp_path):
    whole, data = undisturbed
    rng = random.Random(SEED + 1)
    for job in TABLES:
        for moment in [*rng.sample(range(1, 11), 3), "fold", "manifest"]:
            check(job, moment, whole, data, tmp_path)
