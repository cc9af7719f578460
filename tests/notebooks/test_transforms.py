"""The notebook runs from its first cell to its last, in a kernel of its own, and says what it promises."""

import pathlib

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[2]


def test_it_runs(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(ROOT / "notebooks" / "transforms.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    text = " ".join(output["data"]["text/plain"] for output in outputs if output.output_type == "execute_result")
    assert len(images) == 2
    assert "lossless: True" in text
    assert "one expert times 0.98" in text
