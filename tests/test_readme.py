"""The README is true: its tree lists every module, its commands exist, its queries run."""

import doctest
import re
import shutil

import pytest

from pipeline import sweep
from pipeline.analyses import deconv, occlusion, top9
from pipeline.cluster import Workers
from pipeline.context import Options
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_tree_lists_every_module():
    tree = README.split("## What is where")[1]
    for package in ("zfnet", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.name in tree or path.stat().st_size == 0 or path.name == "__init__.py", path
    for path in (ROOT / "jobs").glob("*.py"):
        assert path.name == "__init__.py" or re.search(rf"\b{path.stem}\b", tree), path
    for name in re.findall(r"\b\w+\.py\b", tree):
        assert list(ROOT.glob(f"*/**/{name}")), f"{name} is in the README's tree and not in the project"


def test_every_command_and_link_exists():
    for command in set(re.findall(r"python (jobs/\w+\.py)", README)):
        assert (ROOT / command).is_file()
    for link in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_queries_run(make_run, make_shards, tmp_path, monkeypatch):
    data, run = make_shards(val=[12]), make_run()
    options = Options(run=str(run), data=str(data), workers=Workers(num=0))
    sweep.run(top9.ANALYSIS, options, top9.Config(layers=("conv1", "conv5")))
    sweep.run(deconv.ANALYSIS, options, deconv.Config())
    sweep.run(occlusion.ANALYSIS, options, occlusion.Config(first=2, stride_px=25))
    (tmp_path / "runs").mkdir()
    shutil.move(run, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    examples = doctest.DocTestParser().get_examples(README.replace("\n```\n", "\n\n"))
    assert len(examples) >= 9
    for example in examples:
        try:
            exec(compile(example.source, "README.md", "single"), names)
        except Exception as error:
            pytest.fail(f"{example.source.strip()}: {error!r}")
