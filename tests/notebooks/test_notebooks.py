"""Every notebook runs from a clean state, and is stored without its outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
every_notebook = pytest.mark.parametrize(
    "path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name
)


def test_there_are_notebooks():
    assert list(NOTEBOOKS.glob("*.ipynb"))


@every_notebook
def test_it_is_stored_without_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@every_notebook
def test_it_has_no_logic_of_its_own(path):
    """What is worth a class or many lines is worth a place in the library."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 30
            assert "class " not in cell.source


@every_notebook
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own start
def test_it_runs_from_a_clean_state(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    shown = [out["data"] for out in outputs if "data" in out]
    assert any("image/png" in data for data in shown)
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert len(set(pictures)) == len(pictures)  # a figure that a cell ends with is shown again
    for data in shown:  # not <Figure size …>
        assert "Figure" not in data.get("text/plain", "") or "image/png" in data
