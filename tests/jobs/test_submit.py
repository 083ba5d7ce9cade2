"""`ray job submit` and `--address`, on a real head: own ports, own folder, a token thrown away afterwards."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.jobs.killing import alive
from tests.pipeline.exact import assert_same

BIN = Path(sys.executable).parent
SWEEP = ("--layers", "conv1", "conv2", "--part-size", "4", "--batch-size", "2")


@dataclass(frozen=True)
class Head:
    """A running head: how to reach it."""

    address: str
    dashboard: str
    env: dict[str, str]
    cwd: Path


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def stop(mark: str) -> None:
    """End the processes that carry the mark, and no others: `ray stop` would end every Ray of the machine."""
    deadline = time.monotonic() + 30
    while found := alive(mark):
        assert time.monotonic() < deadline, "processes of the head are still there after 30 s"
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    mark, folder = uuid.uuid4().hex, Path(tempfile.mkdtemp(prefix="zf-", dir="/tmp"))  # sockets want a short path
    port, dashboard, client, agent, agent_grpc = free_ports(5)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex + uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "dashboard-agent-grpc-port": agent_grpc,
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "num-gpus": 0,
        "object-store-memory": 128 * 2**20,
        "temp-dir": folder / "ray",
        "include-dashboard": "true",
    }
    start = [str(BIN / "ray"), "start", "--head", *(f"--{name}={value}" for name, value in options.items())]
    (folder / "cwd").mkdir()
    try:
        done = subprocess.run(
            start,
            cwd=folder / "cwd",
            env={**env, "ZFNET_TEST_HEAD": mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env, folder / "cwd")
    finally:
        stop(mark)
        shutil.rmtree(folder, ignore_errors=True)


def submit(
    head: Head, *command: object, working_dir: Path | None = None, options: tuple[str, ...] = (), cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, by default from the root of the project, as the README has it."""
    where = () if working_dir is None else ("--working-dir", str(working_dir))
    return ray_job(head, "submit", *where, *options, "--", *map(str, command), cwd=cwd)


def ray_job(head: Head, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`ray job`, as someone does who has the token."""
    return subprocess.run(
        [str(BIN / "ray"), "job", *arguments],
        cwd=cwd,
        env={**head.env, "RAY_ADDRESS": head.dashboard},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture
def world(make_run, make_shards) -> tuple[Path, Path]:
    return make_run(), make_shards(val=[9, 6])


def check_result(run: Path, data: Path, tmp_path: Path) -> None:
    """The table equals that of a run in process."""
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("results", "unfinished"))
    job = [sys.executable, str(ROOT / "jobs" / "top9.py"), "--run", str(alone), "--data", str(data), *SWEEP]
    subprocess.run([*job, "--workers.num", "0"], check=True, stdout=subprocess.DEVNULL, timeout=60)
    assert_same(alone, run, "top9", "feature_maps")


def test_a_submitted_job_runs_in_a_copy_of_the_project_and_writes_where_it_is_told(head, world, tmp_path):
    run, data = world
    done = submit(head, "python", "jobs/top9.py", "--run", run, "--data", data, *SWEEP, working_dir=Path())
    assert done.returncode == 0, done.stdout
    assert "top9: finished in" in done.stdout
    assert "succeeded" in done.stdout
    assert set(pd.read_parquet(run / "results" / "account").attempts) == {1}
    check_result(run, data, tmp_path)


@pytest.mark.slow
def test_a_relative_path_in_a_submitted_copy_is_refused_and_the_job_fails(head):
    """An entry point that fails with any status makes the command line end with 1; the message is in its output."""
    done = submit(head, "python", "jobs/top9.py", "--run", "runs/demo", "--data", "/x", working_dir=Path())
    assert done.returncode == 1
    assert "error: 'runs/demo' is relative, and this job runs in a throw-away copy of your folder" in done.stdout
    assert "absolute path" in done.stdout
    assert "exit code 1" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_a_submitted_job_runs_in_place_where_the_project_lies_on_the_node(head, world, tmp_path):
    run, data = world
    done = submit(head, "python", ROOT / "jobs" / "top9.py", "--run", run, "--data", data, *SWEEP)
    assert done.returncode == 0, done.stdout
    check_result(run, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("copied", [True, False])
def test_a_job_is_submitted_from_another_folder(head, world, tmp_path, copied):
    """With the project's folder as --working-dir, or the job's absolute path on the node."""
    run, data = world
    job, where = ("jobs/top9.py", ROOT) if copied else (ROOT / "jobs" / "top9.py", None)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = submit(head, "python", job, "--run", run, "--data", data, *SWEEP, working_dir=where, cwd=elsewhere)
    assert done.returncode == 0, done.stdout
    check_result(run, data, tmp_path)
    assert list(elsewhere.iterdir()) == []


@pytest.mark.slow
def test_without_the_token_nothing_is_answered(head, world):
    run, data = world
    stranger = {name: value for name, value in head.env.items() if not name.startswith("RAY_AUTH")}
    job = ("python", "jobs/top9.py", "--run", run, "--data", data, *SWEEP)
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        done = submit(replace(head, env={**stranger, **token, "HOME": str(run.parent)}), *job, working_dir=Path())
        assert done.returncode != 0
        assert re.search("40[13]|[Uu]nauthori[sz]ed|[Ii]nvalid authentication token", done.stdout), done.stdout
    assert not (run / "results").exists()
    assert not (run / "unfinished").exists()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def drivers(run: Path) -> list[str]:
    """Processes with this run on their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [line.parent.name] if str(run).encode() in line.read_bytes() else []
    return found


@pytest.mark.slow
def test_a_stopped_job_ends_with_its_workers_and_the_same_command_goes_on(head, make_run, make_shards, tmp_path):
    """--no-wait, then status, logs and stop, as docs/cluster.md has them."""
    run, data = make_run("stopped"), make_shards(val=[60])
    job = ("--data", str(data), "--first", "60", "--stride-px", "1", "--part-size", "1")
    command = ("python", "jobs/occlusion.py", "--run", run, *job)

    def parts() -> int:
        return len(list(run.glob("unfinished/occlusion/*/parts/part-*")))

    done = submit(head, *command, working_dir=Path(), options=("--no-wait", "--submission-id", "to-stop"))
    assert done.returncode == 0, done.stdout
    wait_until(lambda: parts() >= 3, 60)
    assert "RUNNING" in ray_job(head, "status", "to-stop").stdout
    stopped = ray_job(head, "stop", "to-stop")
    assert stopped.returncode == 0, stopped.stdout
    assert "'to-stop' was stopped" in ray_job(head, "status", "to-stop").stdout
    said = ray_job(head, "logs", "to-stop").stdout
    assert "60 images, 60 of 60 parts to do" in said
    assert "terminated; what is done is kept. To go on: " in said
    assert "SIGTERM received" not in said
    assert drivers(run) == []
    assert not list(run.glob("unfinished/occlusion/*/lease.json")), "it is given back"
    time.sleep(2)  # what was under way is committed, or lost with its worker
    left = parts()
    time.sleep(3)
    assert 3 <= parts() == left < 60, "nobody works on it any more"
    assert not (run / "results").exists()
    done = submit(head, *command, working_dir=Path())
    assert done.returncode == 0, done.stdout
    assert f"60 images, {60 - left} of 60 parts to do" in done.stdout
    alone = make_run("alone")
    again = [sys.executable, str(ROOT / "jobs" / "occlusion.py"), "--run", str(alone), *job, "--workers.num", "0"]
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL, timeout=120)
    assert_same(alone, run, "occlusion")


@pytest.mark.slow
def test_a_submitted_training_leaves_its_model_where_it_is_told(head, make_shards, tmp_path):
    data, run = make_shards(train=[24], val=[6]), tmp_path / "run"
    options = ("--run", run, "--data", data, "--epochs", "1", "--batch", "8")
    done = submit(head, "python", "jobs/train.py", *options, working_dir=Path())
    assert done.returncode == 0, done.stdout
    assert (run / "model" / "weights.safetensors").exists()


@pytest.mark.slow
def test_more_skipped_than_allowed_is_told_by_a_submitted_job(head, make_run, tmp_path):
    """Ray's command line has but 0 and 1; the status 3 is in its message."""
    from pipeline.indexing import index_shards
    from tests.conftest import samples
    from tests.tars import write_tar

    data, run = tmp_path / "data", make_run()
    data.mkdir()
    write_tar(data / "val-0.tar", [*samples(4), ("bad", {"jpg": b"x"})])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    done = submit(head, "python", "jobs/top9.py", "--run", run, "--data", data, *SWEEP, working_dir=Path())
    assert done.returncode == 1
    assert "1 of 5 samples skipped (1 bad_image)" in done.stdout
    assert "exit code 3" in done.stdout


def join(head: Head, run: Path | str, data: Path | str, address: str, cwd: Path = ROOT, seconds: int = 150):
    job = [sys.executable, str(ROOT / "jobs" / "top9.py"), "--run", str(run), "--data", str(data), *SWEEP]
    return subprocess.run(
        [*job, "--address", address],
        cwd=cwd,
        env=head.env,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def workers_of(head: Head) -> list[str]:
    """The logs that workers of the head's session have left."""
    logs = head.cwd.parent / "ray" / "session_latest" / "logs"
    return [path.name for path in logs.glob("worker-*.out")]


@pytest.mark.slow
def test_address_joins_the_cluster_that_is_there(head, world, tmp_path):
    run, data = world
    before = len(workers_of(head))
    done = join(head, run, data, head.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(workers_of(head)) > before, "the head's own workers did it"
    check_result(run, data, tmp_path)


@pytest.mark.slow
def test_relative_paths_mean_the_same_to_workers_started_elsewhere(head, world):
    run, data = world
    assert head.cwd != run.parent
    done = join(head, run.name, data.relative_to(run.parent), head.address, cwd=run.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_an_address_where_no_cluster_answers_is_refused(head, world):
    run, data = world
    done = join(head, run, data, f"127.0.0.1:{free_ports(1)[0]}", seconds=45)
    assert done.returncode == 1
    assert "no Ray cluster answers at '127.0.0.1:" in done.stderr
    assert "start one or leave --address out" in done.stderr
    assert "Traceback" not in done.stderr
