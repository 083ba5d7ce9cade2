"""The pace inside an epoch, how long networks wait, what Prometheus reads from Ray, and what Grafana shows of it."""

import json
import re
import threading
import time
import urllib.request

import pandas as pd
import pytest

from pipeline import gauges, metrics, sweep, train
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.runs import Run
from pipeline.waiting import Waiting
from tests.conftest import ROOT, samples
from tests.pipeline.test_train import options
from tests.tars import write_tar


def test_pace_is_of_the_steps_since_it_was_last_said(tmp_path, monkeypatch):
    """An epoch of 100 steps of 8 images, two of three epochs' steps to go; the first step warms up."""
    run = Run.at(str(tmp_path / "run"))
    now = 50.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    pace = metrics.Pace(run, every_seconds=10)

    def advance(step, seconds, waited):
        nonlocal now
        now += seconds
        pace.advance(step, 300, 100, 8, waited)
        return metrics.pace(run)

    assert advance(101, 30.0, 3.0) is None  # slow, and not counted
    assert advance(105, 9.0, 4.0) is None
    assert advance(110, 9.0, 7.5) == {
        "step": 110,
        "steps": 100,
        "images_per_second": 9 / 18 * 8,
        "data_wait_share": 4.5 / 18,
        "seconds_left": 190 / (9 / 18),
    }
    assert advance(111, 1.0, 7.5)["step"] == 110
    assert advance(130, 9.0, 7.5) == {
        "step": 130,
        "steps": 100,
        "images_per_second": 2.0 * 8,
        "data_wait_share": 0.0,
        "seconds_left": 170 / 2.0,
    }


def test_the_pace_is_said_in_the_middle_of_an_epoch(make_shards, tmp_path, monkeypatch, capsys):
    """Every line in turn, with the time that is left."""
    from pipeline import loop

    data, run = make_shards(train=[64], val=[4]), tmp_path / "run"
    monkeypatch.setattr(loop, "PROGRESS_SECONDS", 0.5)
    step = loop.Trainer._step

    def slow(self, examples):
        time.sleep(0.7)
        return step(self, examples)

    monkeypatch.setattr(loop.Trainer, "_step", slow)
    assert train.run(options(run, data, epochs=1)) == 0
    said = re.findall(r"epoch 1/1, step (\d)/8  (\d+) images/s  waiting \d+%  00:0(\d) left", capsys.readouterr().out)
    assert 3 <= len(said) <= 7
    for number, rate, left in said:
        assert 0 < int(rate) < 8 / 0.7
        assert int(left) >= int(0.7 * (8 - int(number)))
    assert [number for number, *_ in said] == sorted({number for number, *_ in said})


def test_a_network_waits_while_it_has_no_batch(monkeypatch):
    """Two threads: idle between two parts, then two batches that take turns with their decoding."""
    from pipeline import waiting as module

    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    waiting = Waiting(threads=2)
    reports = []
    for seconds in (1.0, 2.0):  # before the first part nothing is waited for
        with waiting.part() as spent:
            with spent.on("waited"):
                now += seconds
            with spent.on("network"):
                now += 10.0
        reports.append(spent.report())
        now += 5.0
    assert reports == [
        {"network_seconds": 10.0, "waited_seconds": 1.0},
        {"network_seconds": 10.0, "waited_seconds": 2 * 5.0 + 2.0},
    ]
    with waiting.part(), waiting.part() as beside_another:
        now += 3.0
    assert beside_another.report() == {"network_seconds": 0.0, "waited_seconds": 0.0}


def page(node):
    """What a node shows to Prometheus."""
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read().decode()


def scrape(node, stop, found):
    """Keep the newest value of each of our gauges that the node's endpoint shows, until told to stop."""
    while not stop.wait(0.5):
        for name, tags, value in re.findall(r"^ray_zfnet_(\w+)\{(.*)\} (\S+)$", page(node), re.MULTILINE):
            found[name, re.search(r'run="([^"]*)"', tags)[1]] = float(value)


@pytest.mark.slow
def test_prometheus_reads_the_metrics(make_shards, tmp_path, ray_cluster):
    """Ray hands gauges on every ten seconds: the training takes somewhat longer."""
    import ray

    data, run = make_shards(train=[200], val=[6]), tmp_path / "scraped"
    stop, found = threading.Event(), {}
    (node,) = ray.nodes()
    thread = threading.Thread(target=scrape, args=(node, stop, found))
    thread.start()
    try:
        assert train.run(options(run, data, epochs=60, workers=Workers(num=1, cpus=1))) == 0
    finally:
        stop.set()
        thread.join()
    table = pd.read_parquet(run / "metrics")
    for name in metrics.METRICS.names:
        assert found[name, "scraped"] in table[name].tolist(), name


def test_the_dashboard_asks_for_metrics_that_there_are():
    ours = {name for name in queried() if name.startswith("ray_zfnet_")}
    sweeps = {f"ray_zfnet_{name}" for name in gauges.SWEEP}
    assert sweeps <= ours <= sweeps | {f"ray_zfnet_{name}" for name in metrics.METRICS.names}


def queried():
    """The metrics that the Grafana dashboard asks for."""
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    return {name for expression in asked for name in re.findall(r"\bray_\w+", expression)}


@pytest.mark.slow
def test_prometheus_reads_a_sweep_and_what_the_dashboard_asks_for(make_run, ray_cluster, tmp_path):
    """The last values stay as long as the driver lives; Ray hands them on every ten seconds."""
    import ray

    from pipeline.indexing import index_shards

    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "val-0.tar", [*samples(9), ("bad", {"jpg": b"x"})])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    asked = Options(run=str(make_run("swept")), data=str(data), workers=Workers(num=1, cpus=1))
    assert sweep.run(top9.ANALYSIS, asked, top9.Config(layers=("conv1",), part_size=4)) == 3
    (node,) = ray.nodes()
    deadline, found = time.monotonic() + 60, {}
    while found.get("parts_left") != 0 or len(found) < len(gauges.SWEEP):
        assert time.monotonic() < deadline, found
        time.sleep(1)
        text = page(node)
        lines = re.findall(r"^ray_zfnet_sweep_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
        found = {name: float(value) for name, tags, value in lines if 'run="swept"' in tags and 'table="top9"' in tags}
    assert (found["parts_done"], found["skipped"]) == (3, 1)
    assert found["images_per_second"] > 0
    assert 0 < found["data_wait_share"] < 1
    assert 'reason="bad_image"' in text
    exported = set(re.findall(r"^(ray_\w+)", text, re.MULTILINE))
    assert queried() - {f"ray_zfnet_{name}" for name in metrics.METRICS.names} <= exported
