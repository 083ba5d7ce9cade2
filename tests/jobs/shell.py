"""Jobs as processes of their own, started in a tenth of the time: forked from one that has imported torch and Ray.

Of the project nothing is imported before the fork. Each job is a process with its own arguments, environment, limits,
output and exit status, and its file runs as `__main__`, as from a shell.
"""

import multiprocessing
import os
import resource
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = multiprocessing.get_context("forkserver")
"""Processes that have imported all this before they start."""
PROCESSES.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch.utils.data",
        "torchmetrics.classification",
        "ray.data",
        "pandas",
        "pyarrow.parquet",
        "pyarrow.compute",
        "webdataset",
        "tyro",
        "jinja2",
        "safetensors.torch",
        "scipy.io",
        "PIL.Image",
    ]
)


@dataclass(frozen=True)
class Done:
    """What a job left behind."""

    status: int | None
    out: str
    err: str


def run(job: str, *arguments: object, cwd: Path = ROOT, largest_file: int | None = None) -> Done:
    """Run jobs/JOB.py to its end; `largest_file` is RLIMIT_FSIZE in bytes: the disk is full there."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("out", "err")]
        process = start(job, *arguments, cwd=cwd, largest_file=largest_file, streams=streams)
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
        return Done(process.exitcode, *(stream.read_text() for stream in streams))


def start(
    job: str,
    *arguments: object,
    streams: list[Path],
    cwd: Path = ROOT,
    largest_file: int | None = None,
    environment: dict[str, str] | None = None,
) -> multiprocessing.process.BaseProcess:
    """The job, begun: a process and, from then on, a session of its own; what it says goes into two files."""
    given = [str(argument) for argument in arguments]
    variables = {**os.environ, **(environment or {})}
    places = [str(stream) for stream in streams]
    process = PROCESSES.Process(target=_job, args=(job, given, str(cwd), variables, largest_file, places))
    process.start()
    return process


def _job(
    job: str, arguments: list[str], cwd: str, environment: dict[str, str], largest_file: int | None, streams: list[str]
) -> None:
    os.setsid()
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    import torch

    torch.set_num_threads(1)  # the default of a fresh process is every core, and tests share them
    path = str(ROOT / "jobs" / f"{job}.py")
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
