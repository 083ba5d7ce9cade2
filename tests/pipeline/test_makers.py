"""Every table is made by a job that there is, and the command that is named for it is one that the job takes."""

import importlib

import pytest

from docs.generate import tables as page
from pipeline import makers
from pipeline.analysis import Analysis
from pipeline.atlas.catalogue import ABOUT
from tests.conftest import ROOT
from tests.jobs.parse import would_take

DECLARED = [name for name in page.found() if name not in page.APART]


@pytest.mark.parametrize("table", [name for name in DECLARED if makers.job(name) != "shards"])
def test_the_command_that_makes_a_table_is_one_that_its_job_takes(table):
    needed = "--layers fc6" if table == "transfer_duplicates" else ""
    would_take(makers.command(table, "runs/a run's", needed))
    named = table != "metrics" and makers.job(table) not in {"ablation", "scratch"}  # which train
    if named:
        command = makers.command(f"{table}-by-hand", "runs/demo", needed)
        assert command.endswith(" --name by-hand")
        would_take(command)


@pytest.mark.parametrize("job", sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))
def test_an_analysis_writes_the_tables_that_its_job_is_named_for(job):
    analysis = getattr(importlib.import_module(f"jobs.{job}"), "ANALYSIS", None)
    written = analysis.tables if isinstance(analysis, Analysis) else (analysis.table,) if analysis else ()
    assert {makers.job(table) for table in written} <= {job}
    assert set(written) <= set(DECLARED)


def test_a_command_says_where_images_are_read_and_options_are_given():
    assert makers.command("top9", "runs/demo") == "python jobs/top9.py --run runs/demo --data SHARDS"
    assert makers.command("units", "runs/demo") == "python jobs/units.py --run runs/demo"
    made = makers.command("pictures-groups", "a b", "--of groups")
    assert made == "python jobs/pictures.py --run 'a b' --data SHARDS --of groups --name groups"


def test_the_atlas_says_of_every_table_what_it_is_about():
    missing = set(page.found()) - set(ABOUT) - {"samples"}  # which lies beside the shards, not in a run
    assert not missing, f"say in pipeline/atlas/catalogue.py what {missing} are about"
