"""The notebook runs from its first cell to its last, in a kernel of its own, and is kept without outputs."""

import json

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

FILE = ROOT / "examples" / "first_steps.ipynb"


def test_no_outputs_are_kept():
    cells = json.loads(FILE.read_text())["cells"]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


@pytest.mark.long
def test_the_notebook_runs_and_draws(tmp_path, monkeypatch):
    monkeypatch.setenv("ITERATIONS", "4")
    monkeypatch.setenv("OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(FILE, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("'bbox/AP50'" in output.get("data", {}).get("text/plain", "") for output in outputs)
    assert (tmp_path / "out" / "model_final.pth").exists()
