"""The notebooks run from end to end on the CPU, with the embedded model, and with a few steps of training."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch, micro_models):
    """The one that draws only does it with the embedded model; those that train, with a stand-in for it."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, *cells = notebook.cells
    assert f"/blob/main/colab/{path.name})" in first.source and 'MODEL = "tiny"' in "".join(c.source for c in cells)
    for cell in cells:
        cell.source = cell.source.replace('"steps": 100 if SMALL', '"steps": 12 if SMALL')
    if path.stem != "text_to_image":
        folder = micro_models(stand_in=True)
        replace = f"import pathlib, sdjax.outline\nsdjax.outline._EMBEDDED = pathlib.Path({str(folder)!r})"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(replace))
    monkeypatch.setenv("XLA_FLAGS", "")  # the notebook must not get the eight devices of the tests
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    errors = [output.text for output in outputs if output.output_type == "stream" and "Traceback" in output.text]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert not errors and (pictures or path.stem == "multi_device")


def test_notebooks_are_saved_without_outputs():
    assert len(NOTEBOOKS) == 6
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path.name
