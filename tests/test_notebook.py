"""The quickstart notebook: run whole from nothing, and committed with its pictures."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.once
NOTEBOOK = pathlib.Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_it_is_committed_as_it_ran_and_says_nothing_of_the_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    kinds = {output.get("name", output.output_type) for cell in cells for output in cell.outputs}
    assert kinds <= {"stdout", "display_data", "execute_result"}, "no error, nothing on stderr"
    assert sum(map(pictures, cells)) == 4
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 600_000
    assert not re.search(r"/(home|root|tmp|Users|private|work)/|[A-Z]:\\\\\\\\", text)


def test_links_inside_lead_to_headings():
    text = "\n".join(
        cell.source
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells
        if cell.cell_type == "markdown"
    )
    headings = {h.replace(" ", "-") for h in re.findall(r"^## (.+)$", text, re.MULTILINE)}
    links = re.findall(r"\]\(#([^)\n]+)\)", text)
    assert links and set(links) == headings


@pytest.mark.slow
def test_it_runs_from_nothing(tmp_path):
    long = bool(os.environ.get("KERAS_RESNET_LONG"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shown = [pictures(cell) for cell in code_cells(notebook)]
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
        if not long:  # one epoch, of a network that learns nothing in it
            cell.source = cell.source.replace("epochs=6", "epochs=1")
            cell.source = cell.source.replace('"resnet20"', '"resnet_tiny"')
    client = nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()  # an error of a cell is raised
    assert [pictures(cell) for cell in code_cells(notebook)] == shown

    folder = tmp_path / "runs" / "quickstart"
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["count"] == 359 and evaluation["top1"] > (0.9 if long else 0)
    assert (folder / "run" / "report.html").stat().st_size > 50_000
    assert (folder / "digits.onnx").is_file() == bool(importlib.util.find_spec("onnxruntime"))
