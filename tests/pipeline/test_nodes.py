"""Sweeps on nodes that are not alike: decoders on some, networks on others, several actors on a GPU.

The nodes are Ray's own, on this machine, with the GPUs and resources that they are said to have; what computes is the
CPU (--device cpu).
"""

import json
import math
from collections import Counter

import pandas as pd
import pytest
import torch

from pipeline import cluster, sweep
from pipeline.analyses import evaluation, occlusion, top9
from pipeline.cluster import CannotSchedule, Decoders, Resources, Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from pipeline.runs import RunError
from pipeline.work import Work
from tests.pipeline import poison
from tests.pipeline.exact import assert_same

IN_PROCESS = Workers(num=0)
GPU_NODE = {"CPU": 2, "GPU": 1}
CPU_NODE = {"CPU": 3, "decoding": 1}


def run_job(module, run, data, config, **options):
    return sweep.run(module.ANALYSIS, Options(run=str(run), data=str(data), **options), config)


def sweep_top9(run, data, **options):
    config = top9.Config(layers=("conv1", "conv5"), part_size=4, batch_size=3)
    return run_job(top9, run, data, config, **options)


@pytest.fixture
def nodes(monkeypatch):
    """Pretend that the cluster has these nodes."""

    def pretend(*found):
        monkeypatch.setattr(cluster, "nodes", lambda: [dict(node) for node in found])

    return pretend


@pytest.mark.parametrize(
    ("workers", "found", "expected"),
    [
        (Workers(), [GPU_NODE, CPU_NODE], Resources(1, 2, 1.0)),
        (Workers(gpus=0.5), [GPU_NODE], Resources(2, 1, 0.5)),
        (Workers(gpus=0.1, cpus=1), [{"CPU": 64, "GPU": 4}], Resources(40, 1, 0.1)),
        # A share is of one GPU: of three, 0.4 each, it is two on each and not seven on all.
        (Workers(gpus=0.4, cpus=1), [{"CPU": 64, "GPU": 3}], Resources(6, 1, 0.4)),
        (Workers(gpus=2), [{"CPU": 64, "GPU": 8}, GPU_NODE], Resources(4, 16, 2)),
        (Workers(gpus=0), [{"CPU": 0, "GPU": 0}, CPU_NODE], Resources(1, 3, 0)),
        (Workers(on="big"), [CPU_NODE, {"CPU": 8, "big": 1}], Resources(1, 8, 0.0, "big")),
        (Workers(num=3, on="accelerator_type:A10G"), [GPU_NODE, {"CPU": 48, "GPU": 4, "accelerator_type:A10G": 1}],
         Resources(3, 12, 1.0, "accelerator_type:A10G")),
    ],
)  # fmt: skip
def test_what_an_actor_gets(nodes, workers, found, expected):
    nodes(*found)
    assert cluster.resolve(workers) == expected


@pytest.mark.parametrize(
    ("workers", "found", "message"),
    [
        (Workers(num=7, gpus=0.4, cpus=1), [{"CPU": 64, "GPU": 3}], "7 workers of 1 CPUs and 0.4 GPUs .+ 6 fit"),
        (Workers(on="big"), [CPU_NODE], "at least 1 CPUs and 0 GPUs and the resource 'big'; the cluster has 1 nodes"),
    ],
)
def test_what_never_fits_is_refused(nodes, workers, found, message):
    nodes(*found)
    with pytest.raises(CannotSchedule, match=message):
        cluster.resolve(workers)


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (1.5, "1.5: give a whole number, or a share below 1"),
        (1e-9, "1e-09: give 0, or a share of at least 0.0001"),
        *((gpus, f"{gpus:g}: give 0 or more") for gpus in (-1.0, math.nan, math.inf, -math.inf)),
    ],
)
def test_what_is_no_number_or_share_of_gpus_is_refused(gpus, message):
    with pytest.raises(CannotSchedule, match=f"--workers.gpus is {message}"):
        Workers(gpus=gpus)


@pytest.mark.parametrize("on", ["CPU", "GPU", "memory", "object_store_memory", "", " "])
@pytest.mark.parametrize("kind", [Workers, Decoders])
def test_a_resource_that_marks_no_nodes_is_refused(kind, on):
    with pytest.raises(CannotSchedule, match=f"--{kind.__name__.lower()}.on is '{on}': give a resource that marks"):
        kind(on=on)


@pytest.mark.parametrize("num", [10**6, 10**30])
def test_more_than_there_is_room_for_is_refused(nodes, num):
    nodes(GPU_NODE, CPU_NODE)
    for workers in (Workers(num=num, gpus=0), Workers(num=num), Workers(cpus=num), Workers(gpus=num)):
        with pytest.raises(CannotSchedule, match="the cluster has 2 nodes"):
            cluster.resolve(workers)
    for decoders in (Decoders(num=num), Decoders(num=1, cpus=num)):
        with pytest.raises(CannotSchedule, match="the cluster has 2 nodes"):
            cluster.resolve_decoders(decoders, Resources(1, 1, 1.0))


@pytest.mark.parametrize(
    ("decoders", "workers", "found", "message"),
    [
        (Decoders(num=4), Workers(), [GPU_NODE, CPU_NODE], "4 decoders of 1 CPUs .+ 3 fit on the 1 nodes .+'decoding'"),
        (Decoders(num=1), Workers(), [GPU_NODE], "0 fit on the 0 nodes .+ see docs/cluster.md"),
        # Workers without GPUs may be put on the decoders' node.
        (Decoders(num=1), Workers(), [{"CPU": 2}, CPU_NODE], "workers fit on nodes with the resource 'decoding'"),
        (Decoders(num=1), Workers(), [{**GPU_NODE, "decoding": 1}], "workers fit on nodes with the resource"),
    ],
)
def test_decoders_that_could_wait_for_ever_are_refused(nodes, decoders, workers, found, message):
    nodes(*found)
    with pytest.raises(CannotSchedule, match=message):
        cluster.resolve_decoders(decoders, cluster.resolve(workers))


def test_decoders_need_ray_and_a_number():
    with pytest.raises(RunError, match=r"--decoders.num is 2 and --workers.num 0"):
        Options(workers=IN_PROCESS, decoders=Decoders(num=2))
    with pytest.raises(CannotSchedule, match=r"--decoders.cpus is 0: give at least 1"):
        Decoders(num=2, cpus=0)


@pytest.fixture(scope="module")
def unlike_nodes():
    """A head without a CPU, a node with a GPU, and one that decodes."""
    import ray
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        ray.shutdown()
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 128 * 2**20})
    made.add_node(num_cpus=2, num_gpus=1, object_store_memory=128 * 2**20)
    made.add_node(num_cpus=2, resources={"decoding": 1}, object_store_memory=128 * 2**20)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.slow
def test_decoders_on_other_nodes_change_no_bit(make_run, make_shards, unlike_nodes, tmp_path, capsys):
    """Two actors share the GPU; the account shows one attempt at each part, and every part was decoded elsewhere."""
    data, plain = make_shards(val=[9, 6]), make_run("plain")
    apart = make_run("apart")
    assert sweep_top9(plain, data, workers=IN_PROCESS) == 0
    capsys.readouterr()
    status = sweep_top9(apart, data, workers=Workers(gpus=0.5), decoders=Decoders(num=2), device="cpu", log_parts=True)
    assert status == 0
    assert_same(plain, apart, "top9", "feature_maps", "maxima")
    assert set(pd.read_parquet(apart / "results" / "account").attempts) == {1}
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert sorted(line["part"] for line in lines) == [0, 1, 2, 3, 4]
    assert all(line["waited_seconds"] < 60 and line["network_seconds"] > 0 for line in lines)


@pytest.mark.slow
def test_pictures_of_other_analyses_travel_too(make_run, make_shards, unlike_nodes, tmp_path):
    data = make_shards(val=[5, 3])
    away = {"workers": Workers(), "decoders": Decoders(num=1, cpus=2), "device": "cpu"}
    plain, apart = make_run("plain"), make_run("apart")
    for run, options in ((plain, {"workers": IN_PROCESS}), (apart, away)):
        assert run_job(evaluation, run, data, evaluation.Config(part_size=4, views="ten"), **options) == 0
        assert run_job(occlusion, run, data, occlusion.Config(first=2, stride_px=25, part_size=1), **options) == 0
    assert_same(plain, apart, "predictions", "confusion", "evaluation", "occlusion")


@pytest.mark.slow
def test_what_a_decoder_cannot_read_is_skipped_in_the_table_of_its_worker(make_run, unlike_nodes, tmp_path):
    from pipeline.indexing import index_shards
    from tests.conftest import samples
    from tests.tars import write_tar

    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "val-0.tar", [*samples(4), ("bad", {"jpg": b"x"})])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    run = make_run()
    assert sweep_top9(run, data, workers=Workers(), decoders=Decoders(num=1), device="cpu") == 3
    assert pd.read_parquet(run / "results" / "skipped").reason.tolist() == ["bad_image"]


@pytest.mark.slow
@pytest.mark.parametrize("given_up", ["retry", "skip"])
def test_a_part_that_kills_its_decoder_is_given_up_and_no_other(make_run, make_shards, unlike_nodes, given_up):
    run, data = make_run(), make_shards(val=[9, 6])
    away = {"workers": Workers(), "decoders": Decoders(num=2), "device": "cpu"}
    options = Options(run=str(run), data=str(data), attempts=1, given_up=given_up, **away)
    config = top9.Config(layers=("conv1", "conv5"), part_size=4, batch_size=3)
    (run / "poison-decoding").write_text("s0-0005")
    if given_up == "skip":
        assert sweep.run(poison.ANALYSIS, options, config) == 3
        skipped = pd.read_parquet(run / "results" / "skipped")
        assert skipped.key.tolist() == [f"s0-000{i}" for i in (4, 5, 6, 7)]
        return
    with pytest.raises(SweepFailed, match=r"given up: part 1 \(its worker died 1 times.+4 images"):
        sweep.run(poison.ANALYSIS, options, config)
    (parts,) = (run / "unfinished" / "top9").glob("*/parts")
    assert len(list(parts.iterdir())) == 4
    (run / "poison-decoding").unlink()
    assert sweep.run(poison.ANALYSIS, options, config) == 0
    plain = make_run("plain")
    assert sweep_top9(plain, data, workers=IN_PROCESS) == 0
    assert_same(plain, run, "top9", "feature_maps", "maxima")


@pytest.mark.slow
def test_an_actor_without_the_gpu_that_ray_gave_it_says_so(make_run, make_shards, unlike_nodes):
    with pytest.raises(SweepFailed, match=r"has no CUDA: Ray gave it 1 GPUs, and torch sees none.+--device cpu"):
        sweep_top9(make_run(), make_shards(val=[3]), workers=Workers())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused(make_run, make_shards):
    with pytest.raises(SweepFailed, match=r"has no CUDA: --device is cuda.+--device cpu"):
        sweep_top9(make_run(), make_shards(val=[3]), workers=IN_PROCESS, device="cuda")


def decode_and_compute(monkeypatch, run, data, versions=None):
    """A part through a decoder and then an actor, in this process, as Ray Data would hand it on."""
    from pipeline import decoder
    from pipeline.actor import PartActor, torch_settings_kept
    from pipeline.context import open_context

    if versions is not None:
        monkeypatch.setattr(decoder, "versions", lambda: versions)
    options = Options(run=str(run), data=str(data))
    config = top9.Config(layers=("conv1",), part_size=4, batch_size=3, maxima_gb=0)
    work = Work.of(open_context(options, config, "top9", "cpu"), top9.ANALYSIS, ["conv1"])
    work.prepare()
    given = (top9.__name__, options, config, ["conv1"], Resources(1, 1, 0.0), "session", None)
    with torch_settings_kept():
        table = decoder.Decoder(*given)({"part": [0]})
        handed_on = {name: table[name].to_numpy() for name in table.column_names}
        return work, handed_on, PartActor(*given)(handed_on)


def test_a_decoder_counts_its_own_attempts_and_sends_no_file(make_run, make_shards, monkeypatch):
    work, handed_on, done = decode_and_compute(monkeypatch, make_run(), make_shards(val=[4]))
    assert done["error"] == [""]
    assert (work.location / "attempts" / "part-000000").names() == ["session.beside"]
    assert (work.location / "decoding" / "part-000000").names() == ["session.beside"]
    sent = len(handed_on["decoded"][0])
    assert sent < 4 * (64 * 64 * 3 + 1000), "pixels, and not the JPEGs beside them"
    assert Counter(json.loads(done["report"][0])["skipped"]) == Counter()


def test_a_decoder_with_other_versions_is_refused(make_run, make_shards, monkeypatch):
    _, _, done = decode_and_compute(monkeypatch, make_run(), make_shards(val=[4]), versions={"pillow": "1.0"})
    assert "decoded with {'pillow': '1.0'}" in done["error"][0]
    assert "install the same on all nodes" in done["error"][0]
