"""Jobs on an object store: the same tables as on a disk, bit for bit, through faults of the network.

A Ray cluster of two nodes; shards, run, tables and atlas are in the bucket, and no node has a folder of its own.
"""

import random
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow.fs as pafs
import pytest
from safetensors.torch import save

from pipeline import checkpoints
from pipeline.runs import Run
from pipeline.storage import Location
from tests.conftest import random_model
from tests.jobs import shell
from tests.jobs.killing import SEED, Moment, kill_at, start
from tests.pipeline.exact import assert_same
from tests.pipeline.faults import Fault

RUN, DATA = "s3://bucket/runs/small", "s3://bucket/shards/small"
IN_PROCESS = ("--workers.num", "0", "--workers.cpus", "1")
BESIDE = ("manifests", "account")
SHARDS = ("--train", "48", "--val", "24", "--samples-per-shard", "16")
TRAINING = ("--epochs", "2", "--batch", "8", "--checkpoint-steps", "4")
SWEEPS = {
    "top9": ("--part-size", "8", "--batch-size", "4"),
    "deconv": ("--part-size", "4", "--batch-size", "4"),
    "occlusion": ("--part-size", "2", "--first", "4", "--stride-px", "20"),
    "evaluate": ("--part-size", "8"),
    "features": ("--part-size", "8"),
}


def faults() -> list[Fault]:
    """Each after a drawn number of requests like it; KILL_SEED=N draws the same moments again."""
    moment = random.Random(SEED).randrange
    print(f"KILL_SEED={SEED}")
    return [
        Fault("cut", part="shards/small", times=2, spared=moment(8)),
        Fault("cut", part="runs/small", times=3, spared=moment(12)),
        Fault("503", part="bucket", times=3, spared=moment(40)),
        Fault("503", "PUT", part="parts/part-", times=2, spared=moment(3)),
        Fault("lost", "PUT", part="results/", times=2, spared=moment(6)),
        Fault("500", "PUT", part="checkpoints/", times=2, spared=moment(4)),
        Fault("slow", part="bucket", times=5, spared=moment(40), seconds=2.0),
        Fault("503", "HEAD", part="bucket", times=2, spared=moment(40)),
    ]


@pytest.fixture
def cluster(s3):
    """Two nodes whose processes inherit the environment."""
    from ray.cluster_utils import Cluster

    options = {"object_store_memory": 2**27}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **options})
    try:
        for _ in range(2):
            started.add_node(num_cpus=1, **options)
        yield started
    finally:
        started.shutdown()


def done(job: str, *arguments: object) -> str:
    found = shell.run(job, *arguments)
    assert found.status == 0, found.out + found.err
    return found.out


def fetched(url: str, folder: Path) -> Path:
    """A copy of a folder of the bucket."""
    folder.mkdir(parents=True)
    location = Location.of(url)
    pafs.copy_files(location.path, str(folder), source_filesystem=location.filesystem)
    return folder


def everything(url: str) -> list[str]:
    location = Location.of(url)
    found = location.filesystem.get_file_info(pafs.FileSelector(location.path, recursive=True))
    return [info.path for info in found if info.type == pafs.FileType.File]


def imported(run: str | Path, data: str | Path) -> None:
    """A run with a random network, its weights and the names of its classes given beside and in the shards."""
    weights = Location.of(run).parent / "weights.safetensors"
    weights.write(save(random_model(12).state_dict()))
    names = Location.of(data) / "classes.txt"
    done("import_model", "--run", run, "--architecture", "zfnet_small", "--weights", weights, "--classes", names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sweeps_and_atlas_on_s3_are_the_local_ones_through_faults(cluster, s3, tmp_path):
    data, run = tmp_path / "shards", tmp_path / "run"
    done("shards", "rendered", "--out", data, *SHARDS)
    imported(run, data)
    for job, options in SWEEPS.items():
        done(job, "--run", run, "--data", data, *options, *IN_PROCESS)
    done("atlas", "--run", run)
    done("shards", "rendered", "--out", DATA, *SHARDS)
    imported(RUN, DATA)
    s3.inject(*faults())
    for job, options in SWEEPS.items():
        done(job, "--run", RUN, "--data", DATA, *options, "--address", cluster.address)
    done("atlas", "--run", RUN)
    print(Counter(kind for kind, _ in s3.injected))
    assert {kind for kind, _ in s3.injected} == {"cut", "503", "lost", "slow"}
    s3.inject()
    copy = fetched(RUN, tmp_path / "copy")
    tables = sorted(path.name for path in (run / "results").iterdir() if path.name not in ("manifests", "account"))
    assert_same(run, copy, *tables)
    pages = {path.relative_to(run) for path in (run / "atlas").rglob("*") if path.is_file()}
    assert {path.relative_to(copy) for path in (copy / "atlas").rglob("*") if path.is_file()} == pages
    assert not [path for path in everything("s3://bucket") if ".tmp-" in path or "unfinished" in path]
    top9 = pd.read_parquet(f"{RUN}/results/top9")
    pd.testing.assert_frame_equal(top9, pd.read_parquet(run / "results" / "top9"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cached", [False, True])
def test_training_on_s3_is_the_local_one_through_faults(s3, tmp_path, monkeypatch, request, cached):
    """Two workers with decoders of their own, from shards in the bucket, or from each node's cache of them."""
    if cached:
        monkeypatch.setenv("ZFNET_CACHE", str(tmp_path / "cache"))
    cluster = request.getfixturevalue("cluster")
    data, run = tmp_path / "shards", tmp_path / "run"
    together = ("--address", cluster.address, "--workers.num", "2", "--workers.cpus", "1", "--decoders", "1", *TRAINING)
    done("shards", "rendered", "--out", data, *SHARDS)
    done("shards", "rendered", "--out", DATA, *SHARDS)
    done("train", "--run", run, "--data", data, *together)
    s3.inject(*faults())
    done("train", "--run", RUN, "--data", DATA, *together)
    assert {kind for kind, _ in s3.injected} == {"cut", "500", "503", "slow"}
    s3.inject()
    assert Run.at(RUN).load_model().model_id == Run.at(str(run)).load_model().model_id
    assert checkpoints.finished(Run.at(RUN)) == checkpoints.finished(Run.at(str(run))) == [1, 2]
    assert not [path for path in everything(RUN) if ".tmp-" in path]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == (5 if cached else 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", ["top9", "deconv", "features"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sweep_on_s3_survives_any_kills_of_its_driver(s3, tmp_path, job, workers):
    """Between two uploads of parts, and between those of the fold: workers of a dead driver may still be uploading."""
    data, run = tmp_path / "shards", tmp_path / "run"
    for at, shards in ((run, data), (RUN, DATA)):
        done("shards", "rendered", "--out", shards, *SHARDS)
        imported(at, shards)
        if job == "deconv":
            done("top9", "--run", at, "--data", shards, *SWEEPS["top9"], *IN_PROCESS)
    done(job, "--run", run, "--data", data, *SWEEPS[job], *IN_PROCESS)
    command = (job, "--run", RUN, "--data", DATA, *SWEEPS[job], "--workers.num", workers, "--workers.cpus", 1)
    kills = ["parts/part-", *(["parts/part-"] if not workers else []), f"results/{job}/", f"manifests/{job}/"]
    for number, part in enumerate(kills):  # workers may have done all parts before Ray ends them
        moment, before = Moment.drawn("parts", job, workers, number), uploads(s3, part)
        started = start(*command, log=tmp_path / f"{number}.log")
        kill_at(started, lambda part=part, least=before + 1: uploads(s3, part) >= least, moment, started.kill)
    done(*command)
    copy = fetched(RUN, tmp_path / "copy")
    assert_same(run, copy, *(path.name for path in (run / "results").iterdir() if path.name not in BESIDE))
    assert not [path for path in everything("s3://bucket") if ".tmp-" in path or "unfinished" in path]


def uploads(s3, part: str) -> int:
    """Uploads so far of objects with this in their names."""
    return sum(request.method == "PUT" and part in request.path for request in list(s3.requests))
