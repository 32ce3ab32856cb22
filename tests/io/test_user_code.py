"""Own code runs where the user typed its name or allowed it, and the refusal comes before anything is imported.

What is refused stands in test_bad_inputs.py; that `reproduce` hands the allowance on, in test_reproduce.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kd_accel.io.user_code import VARIABLE, allow, import_problem, take_allowance
from tests.support.in_process import say, train
from tests.support.launching import SMALL, environment, summary

FILE = {
    "data": {"source": "import:tests.support.models:images"},
    "model": {"arch": "import:tests.support.models:student"},
}
OTHERS = [flag for flag in SMALL if "import:" not in flag]


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


@pytest.fixture
def from_file(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(FILE))
    return ["train", f"--config={tmp_path / 'run.yaml'}", f"--run_dir={tmp_path / 'run'}", *OTHERS, "--train.max_steps=1"]


def test_what_was_typed_runs(tmp_path):
    train(tmp_path / "run", "--train.max_steps=1")
    assert summary(tmp_path / "run")["steps"] == 1


def test_a_section_on_the_command_line_is_typed_too(tmp_path):
    settings = [f"--{name}={yaml.safe_dump(value, default_flow_style=True).strip()}" for name, value in FILE.items()]
    say("train", *settings, *OTHERS, "--train.max_steps=1", f"--run_dir={tmp_path / 'run'}")
    assert summary(tmp_path / "run")["steps"] == 1


@pytest.mark.parametrize("where", [0, 1, 5])
def test_the_flag_allows_what_a_file_names_wherever_it_stands(tmp_path, from_file, where):
    assert "names 'import:tests.support.models:images'" in say(*from_file, code=2)
    say(*from_file[:where], "--allow_import", *from_file[where:])
    assert summary(tmp_path / "run")["steps"] == 1


def test_the_variable_allows_it_too(tmp_path, from_file, monkeypatch):
    for refused in ("0", "yes", "import:tests.support.models:images"):
        monkeypatch.setenv(VARIABLE, refused)
        assert "names 'import:tests.support.models:student'" in say(*from_file, code=2)
    monkeypatch.setenv(VARIABLE, "1")
    say(*from_file)
    assert summary(tmp_path / "run")["steps"] == 1


def test_a_teacher_of_the_code_that_was_typed(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--train.max_steps=1"]
    assert "teacher: " in train(tmp_path / "run", *flags, code=2)
    train(tmp_path / "run", *flags, "--model.arch=import:tests.support.models:teacher")


def test_figures_of_an_arch_that_was_typed():
    text = say("bench", "import:tests.support.models:student", "--min_iterations=1", "--min_time_s=0", "--batch_sizes=[1]")
    assert text.startswith("import:tests.support.models:student: ")


def test_values_that_are_no_own_code_allow_nothing(monkeypatch):
    """A typed `1` is what the variable says for all."""
    allow(["1", "x"])
    assert os.environ[VARIABLE] == ""
    assert import_problem("import:a:b", field="x", where="y") is not None
    assert take_allowance(["train", "--allow_import=1"]) == ["train", "--allow_import=1"]
    assert import_problem("import:a:b", field="x", where="y") is not None
    allow(["import:a:b"])
    assert import_problem("import:a:b", field="x", where="y") is None
    assert import_problem("import:a:c", field="x", where="y") is not None


@pytest.mark.slow
def test_the_script_looks_in_the_working_directory_too(tmp_path):
    """As `python -m kd_accel` does. The function gives nothing that could be trained on, so the command ends there."""
    (tmp_path / "mine.py").write_text("def images(split, image_size):\n    return 7\n")
    script = Path(sys.executable).with_name("kd-accel")
    command = [script, "train", "--data.source=import:mine:images"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot import" not in done.stderr and "import:mine:images" in done.stderr


def test_help_names_the_flag(capsys):
    for argv in (["--help"], ["train", "--help"], ["evaluate", "--help"]):
        assert "--allow_import" in say(*argv)
