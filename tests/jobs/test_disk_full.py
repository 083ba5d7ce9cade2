"""A disk that is full in the middle of a job: a clean message, nothing half written, and the same command goes on.

A real file system of 256 MB in memory, of which a file takes all but a drawn number of bytes.
"""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pipeline.runs import Run
from tests.jobs import shell
from tests.pipeline.exact import assert_same

SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
TIMES = 2
ALONE = ("--workers.num", "0", "--workers.cpus", "1")
TABLES = {"top9": ("top9", "feature_maps"), "deconv": ("deconv",), "occlusion": ("occlusion",)}
SWEEPS = {
    "top9": ("--part-size", "4", "--batch-size", "2"),
    "deconv": ("--part-size", "2", "--batch-size", "2"),
    "occlusion": ("--part-size", "1", "--first", "12", "--stride-px", "8"),
}
TRAINING = ("--epochs", "3", "--batch", "8", "--checkpoint-steps", "2", "--decoders", "0")


@pytest.fixture
def disk(tmp_path):
    """A small disk; skipped where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk but for so many bytes."""
    room = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - free))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def job_on_ray(job: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(shell.ROOT / "jobs" / f"{job}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def fills(disk: Path, moments: list[int], job: str, *arguments: object) -> None:
    """The job, again and again, each time refused after it has written so many bytes in all; then with room enough."""
    before = size(disk)
    for most in moments:
        (disk / "ballast").unlink(missing_ok=True)
        free = max(0, most - (size(disk) - before))
        leave(disk, free)
        found = job_on_ray(job, *arguments)
        assert found.returncode == 1, (free, found.stdout, found.stderr)
        assert "No space left on device" in found.stderr, found.stderr
        assert f"cannot write {disk}" in found.stderr
        assert "free space or choose another place, then give the same command again" in found.stderr
        assert "Traceback" not in found.stderr
        # A worker that was ended while it wrote leaves its file in the work's folder, which goes with the work.
        assert not [path for path in disk.rglob(".tmp-*") if "unfinished" not in path.parts]
        for path in disk.rglob("*.parquet"):
            pd.read_parquet(path)
    (disk / "ballast").unlink()
    found = job_on_ray(job, *arguments)
    assert found.returncode == 0, found.stdout + found.stderr
    assert not list(disk.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", SWEEPS)
def test_a_disk_that_fills_during_a_sweep_changes_no_bit(disk, make_run, make_shards, tmp_path, job):
    data, whole = make_shards(val=[9, 7]), make_run("whole")
    before = size(whole)
    if job == "deconv":
        assert shell.run("top9", "--run", whole, "--data", data, *SWEEPS["top9"], *ALONE).status == 0
        before = size(whole)
    shutil.copytree(whole, disk / "run")
    assert shell.run(job, "--run", whole, "--data", data, *SWEEPS[job], *ALONE).status == 0
    chance = random.Random(f"{SEED} {job}")
    moments = sorted(chance.randrange(size(whole) - before) for _ in range(TIMES))
    print(f"seed {SEED}: {job} with {moments} bytes in all")
    fills(
        disk,
        moments,
        job,
        "--run",
        disk / "run",
        "--data",
        data,
        *SWEEPS[job],
        "--workers.num",
        "2",
        "--workers.cpus",
        "1",
    )
    assert_same(whole, disk / "run", *TABLES[job])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_fills_during_training_changes_no_bit(disk, make_shards, tmp_path):
    data, whole = make_shards(train=[24], val=[6]), tmp_path / "whole"
    assert shell.run("train", "--run", whole, "--data", data, *TRAINING, *ALONE).status == 0
    chance = random.Random(SEED)
    moments = [chance.randrange(size(whole) // 2)]  # one: Ray Train starts four times before it gives up
    print(f"seed {SEED}: training with {moments} bytes in all")
    fills(disk, moments, "train", "--run", disk / "run", "--data", data, *TRAINING, "--workers.num", "1")
    assert Run.at(str(disk / "run")).load_model().model_id == Run.at(str(whole)).load_model().model_id
    assert pd.read_parquet(disk / "run" / "metrics").epoch.tolist() == [1, 2, 3]
