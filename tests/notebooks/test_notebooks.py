"""The notebooks run from the first cell to the last, show plots, and are kept without outputs."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

nbformat = pytest.importorskip("nbformat", reason="the notebooks need the [test] extra")


def read(name: str):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_kept_without_outputs(name):
    for cell in read(name)[1]:
        assert cell.outputs == [] and cell.execution_count is None, cell.source
        assert cell.metadata == {}, cell.source


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    from nbclient import NotebookClient

    notebook, cells = read(name)
    client = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    # One device, as a laptop has; and compilations that favour compile time, as in `conftest.py`.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=1", "JAX_PLATFORMS": "cpu"}
    client.execute(env=os.environ | flags)  # raises on the first error of a cell
    assert all(cell.execution_count for cell in cells)
    shown = [kind for cell in cells for output in cell.outputs for kind in output.get("data", {})]
    assert "image/png" in shown
