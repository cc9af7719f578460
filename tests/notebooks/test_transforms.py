"""The notebook runs from its first cell to its last, in a kernel of its own, and says what it promises."""

import pathlib
import subprocess
import sys

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "transforms.ipynb"


def test_it_runs(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    text = " ".join(output["data"]["text/plain"] for output in outputs if output.output_type == "execute_result")
    assert len(images) == 2
    assert "lossless: True" in text
    assert "one expert times 0.98" in text


def test_its_first_cell_fetches_the_repository_where_it_is_opened_by_itself(tmp_path):
    """As in Colab: a clone, what it requires, and no %cd; run once more, nothing is cloned again."""
    package, place = tmp_path / "source/kwaicoder_jax/transforms", tmp_path / "content"
    package.mkdir(parents=True)
    place.mkdir()
    (package.parent / "__init__.py").write_text("ORIGIN = 'clone'\n")
    (package / "__init__.py").write_text("")
    (tmp_path / "source/requirements.txt").write_text("")
    git = ["git", "-C", str(tmp_path / "source"), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    (address,) = (line for line in cell.splitlines() if line.startswith("REPOSITORY = "))
    cell = cell.replace(address, f"REPOSITORY = {(tmp_path / 'source').as_uri()!r}")
    colab = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", f"{colab}{cell}\nimport kwaicoder_jax\nprint(kwaicoder_jax.ORIGIN)"], cwd=place,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.split()[-1:] == ["clone"], done.stderr
