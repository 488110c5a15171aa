"""The notebooks run from their first cell to their last, and are committed with their outputs."""

import pathlib

import pytest

from sdpoint_jax.cli.profile import profile_artefact
from sdpoint_jax.evaluation import cascades, sweep
from sdpoint_jax.profiling.latency import Effort

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "pick_an_instance.ipynb"
LARGEST = 150_000  # Bytes, pictures included.


@pytest.fixture
def artefact(swept, tmp_path):
    """A sweep of the tiny net with latencies and cascades."""
    folder = tmp_path / "sweep"
    sweep.sweep(swept.experiment, swept.params, swept.experiment.instances, folder, split="test")
    plan = cascades.plan_cascades(swept.experiment, swept.experiment.instances, "auto", split="test")
    cascades.evaluate_cascades(swept.experiment, plan, folder)
    profile_artefact(folder / "artefact", [1, 4], effort=Effort(repeats=3))
    return folder / "artefact"


def test_the_notebook_runs(artefact, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"ARTEFACT = {str(artefact)!r}"
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output)
    assert "7 instances, images (8, 8, 1)" in printed
    assert "max_macs 1000: the cheapest instance" in printed
    assert "stopped at" in printed


def test_the_notebook_is_committed_with_small_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in ran)
    assert sum(bool(cell.outputs) for cell in ran) >= len(ran) - 2
    assert not [output for cell in ran for output in cell.outputs if output.output_type == "error"]
    assert NOTEBOOK.stat().st_size < LARGEST
