"""The pace inside an epoch, and what Prometheus reads from Ray."""

import re
import threading
import time
import urllib.request

import pandas as pd
import pytest

from pipeline import metrics, train
from pipeline.cluster import Workers
from pipeline.runs import Run
from tests.pipeline.test_train import options


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


def scrape(node, stop, found):
    """Keep the newest value of each of our gauges that the node's endpoint shows, until told to stop."""
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    while not stop.wait(0.5):
        with urllib.request.urlopen(address, timeout=10) as answer:
            text = answer.read().decode()
        for name, tags, value in re.findall(r"^ray_zfnet_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
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
