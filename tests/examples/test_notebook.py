"""The notebook: its cells run in order, with smaller settings than those of its first cell."""

import json

import pytest

from tests.support.launching import ROOT, python, summary

NOTEBOOK = json.loads((ROOT / "examples/distill.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SMALL = """
from pathlib import Path

import kd_accel as kd

OUT = Path("runs/notebook")
TEACHER_EPOCHS, STUDENT_EPOCHS = 2, 1
TEACHER, STUDENT = "torchvision/resnet18", "torchvision/resnet18"
LIMITS = {"limit_train": 64, "limit_test": 32}
"""


def test_notebook_is_stored_without_outputs():
    assert (NOTEBOOK["nbformat"], len({cell["id"] for cell in NOTEBOOK["cells"]})) == (4, len(NOTEBOOK["cells"]))
    code_cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells)
    assert code_cells[0]["metadata"] == {"tags": ["parameters"]}


def assigned_names(source):
    """Return the names that the lines of a cell assign."""
    return {line.partition(" =")[0] for line in source.splitlines() if " = " in line}


@pytest.mark.slow
def test_cells_run_in_order(tmp_path):
    assert assigned_names(SMALL) == assigned_names(CODE[0])
    # The teacher of two epochs is at chance.
    program = "\n".join([SMALL, *CODE[1:]]).replace('"outputs": "cached"', '"outputs": "cached", "min_accuracy": None')
    done = python("-c", program, cwd=tmp_path)
    assert "64 training images of 10 classes, 32 test images" in done.stdout
    assert done.stdout.count(" M parameters") == 3 and done.stdout.count("predicted") == 5
    runs = tmp_path / "runs/notebook"
    distilled = summary(runs / "distilled")
    assert f"agreement with the teacher: {100 * distilled['agreement']:.2f} %" in done.stdout
    assert distilled["teacher_accuracy"] == summary(runs / "teacher")["accuracy"]
    assert (summary(runs / "alone")["role"], distilled["role"]) == ("student", "distilled")
