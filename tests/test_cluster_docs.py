"""docs/cluster.md is true: its commands and options exist, and it names every field that is written and every gauge."""

import json
import re
from dataclasses import fields

import pytest

from pipeline import gauges, status, sweep
from pipeline.analyses import top9
from pipeline.cluster import Workers
from pipeline.context import Options
from pipeline.errors import SweepFailed
from tests.conftest import ROOT, samples
from tests.jobs.parse import would_take
from tests.pipeline.test_sweep import break_after
from tests.tars import write_tar

PAGE = (ROOT / "docs" / "cluster.md").read_text()


def first_column(begins: str) -> set[str]:
    """The names in the first column of the table under this text."""
    table = PAGE.split(begins, 1)[1].split("|---|", 1)[1].split("\n\n", 1)[0]
    return {
        name
        for line in table.splitlines()
        if line.startswith("|")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }


def lines_of_parts(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"event"')]


@pytest.fixture
def logged(make_run, tmp_path):
    """A sweep in this process that logs its parts; the last of five samples is no image."""
    from pipeline.indexing import index_shards

    data = tmp_path / "data"
    data.mkdir()
    write_tar(data / "val-0.tar", [*samples(4), ("zzz", {"jpg": b"x"})])
    index_shards([str(data / "val-0.tar")], str(data), classes=None, accept_damaged=False)
    asked = Options(run=str(make_run()), data=str(data), workers=Workers(num=0, cpus=1), log_parts=True, max_skipped=1)

    return lambda: sweep.run(top9.ANALYSIS, asked, top9.Config(layers=("conv1",), part_size=3))


def test_a_line_for_each_part_has_the_fields_that_are_documented(logged, capsys):
    assert logged() == 0
    lines = lines_of_parts(capsys)
    assert [line["part"] for line in lines] == [0, 1]
    assert {name for line in lines for name in line} == first_column("**Log lines.**") - {"error"}
    assert [line["samples"] for line in lines] == [3, 2]
    assert [line["skipped"] for line in lines] == [{}, {"bad_image": 1}]
    assert {(line["event"], line["parts"], line["again"], line["device"]) for line in lines} == {
        ("part", 2, False, "cpu")
    }
    for line in lines:
        assert line["network_seconds"] > 0
        assert line["waited_seconds"] > 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


def test_a_part_that_fails_has_a_line_that_says_why(logged, capsys, monkeypatch):
    break_after(monkeypatch, 1)
    with pytest.raises(SweepFailed):
        logged()
    *done, failed = lines_of_parts(capsys)  # both parts are under way at once: either may be the one
    assert all("error" not in line for line in done)
    assert (failed["part"], failed["error"]) == (len(done), "the power went")
    assert set(failed) < first_column("**Log lines.**")


def test_without_the_option_there_are_none(make_run, make_shards, capsys):
    asked = Options(run=str(make_run()), data=str(make_shards(val=[3])), workers=Workers(num=0))
    assert sweep.run(top9.ANALYSIS, asked, top9.Config(layers=("conv1",))) == 0
    assert lines_of_parts(capsys) == []


def test_every_field_of_the_status_is_documented():
    table = PAGE.split("`--json` the same as one object", 1)[1].split("\n\n", 2)[1]
    named = set(re.findall(r"`(\w+)`", table))
    kinds = (status.Status, status.Training, status.Finished, status.Unfinished)
    assert {field.name for kind in kinds for field in fields(kind)} <= named


def test_every_gauge_of_sweeps_is_documented():
    assert {f"ray_zfnet_{name}" for name in gauges.SWEEP} <= first_column("**Gauges.**")


def test_the_jobs_would_take_its_commands():
    commands = re.findall(r"python jobs/\w+\.py[^`#\n]*", PAGE.replace("\\\n", " "))
    assert len(commands) >= 9
    for command in commands:
        would_take(command)


def test_the_jobs_would_take_its_options():
    options = set(re.findall(r"`(--(?:workers|decoders|device|min-workers|failures)[\w.-]* [\w.: -]+)`", PAGE))
    assert len(options) >= 5
    for option in options:
        training = "--min-workers" in option or "--failures" in option
        would_take(f"python jobs/{'train' if training else 'top9'}.py {option}")


def test_the_driver_is_that_of_the_pinned_cuda():
    """What torch's wheel needs beside it is pinned in constraints.txt, CUDA among it."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    cuda = ".".join(pins["cuda-toolkit"].split(".")[:2])
    assert f"torch {pins['torch']}, whose wheel\nbrings CUDA {cuda} along" in PAGE
    assert cuda.startswith("13."), "another CUDA needs another driver: docs/cluster.md, The driver"


def test_its_files_are_there():
    for link in re.findall(r"\]\(([\w/.-]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    for name in ("cluster.yaml", "kuberay.yaml", "Dockerfile", "constraints.txt"):
        assert name in PAGE
        assert (ROOT / name).exists()
