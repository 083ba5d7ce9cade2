"""The notebook runs from a run to its figures."""

import nbformat
import pytest
from nbclient import NotebookClient

from docs.generate import cookbook
from tests.conftest import ROOT


@pytest.mark.slow
def test_the_notebook_goes_from_a_run_to_three_figures(tmp_path, monkeypatch):
    cookbook.make(tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "from_a_run_to_figures.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path / "docs")}}
    NotebookClient(notebook, timeout=120, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
