"""Tests of the permission to run user code: typed on the command line, or allowed by a flag or an environment variable.

The refused cases are in test_bad_inputs.py, the inheritance of the permission by `reproduce` in test_reproduce.py.
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

SETTINGS = {
    "data": {"source": "import:tests.support.models:images"},
    "model": {"arch": "import:tests.support.models:student"},
}
OTHER_FLAGS = [flag for flag in SMALL if "import:" not in flag]


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


@pytest.fixture
def from_file(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return ["train", f"--config={tmp_path / 'run.yaml'}", f"--run_dir={tmp_path / 'run'}", *OTHER_FLAGS, "--train.max_steps=1"]


def test_names_on_the_command_line_are_allowed(tmp_path):
    train(tmp_path / "run", "--train.max_steps=1")
    assert summary(tmp_path / "run")["steps"] == 1


def test_names_in_a_section_on_the_command_line_are_allowed(tmp_path):
    settings = [f"--{name}={yaml.safe_dump(value, default_flow_style=True).strip()}" for name, value in SETTINGS.items()]
    say("train", *settings, *OTHER_FLAGS, "--train.max_steps=1", f"--run_dir={tmp_path / 'run'}")
    assert summary(tmp_path / "run")["steps"] == 1


@pytest.mark.parametrize("position", [0, 1, 5])
def test_the_flag_at_any_position_allows_names_in_files(tmp_path, from_file, position):
    assert "names 'import:tests.support.models:images'" in say(*from_file, code=2)
    say(*from_file[:position], "--allow_import", *from_file[position:])
    assert summary(tmp_path / "run")["steps"] == 1


def test_the_environment_variable_allows_names_in_files(tmp_path, from_file, monkeypatch):
    for refused in ("0", "yes", "import:tests.support.models:images"):
        monkeypatch.setenv(VARIABLE, refused)
        assert "names 'import:tests.support.models:student'" in say(*from_file, code=2)
    monkeypatch.setenv(VARIABLE, "1")
    say(*from_file)
    assert summary(tmp_path / "run")["steps"] == 1


def test_a_teacher_may_use_code_named_on_the_command_line(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--train.max_steps=1"]
    assert "teacher: " in train(tmp_path / "run", *flags, code=2)
    train(tmp_path / "run", *flags, "--model.arch=import:tests.support.models:teacher")


def test_bench_may_use_code_named_on_the_command_line():
    text = say("bench", "import:tests.support.models:student", "--min_iterations=1", "--min_time_s=0", "--batch_sizes=[1]")
    assert text.startswith("import:tests.support.models:student: ")


def test_other_arguments_of_the_command_line_allow_no_names():
    """Check among others the argument `1`, which would allow all names as the value of the variable."""
    allow(["1", "x"])
    assert os.environ[VARIABLE] == ""
    assert import_problem("import:a:b", field="x", where="y") is not None
    assert take_allowance(["train", "--allow_import=1"]) == ["train", "--allow_import=1"]
    assert import_problem("import:a:b", field="x", where="y") is not None
    allow(["import:a:b"])
    assert import_problem("import:a:b", field="x", where="y") is None
    assert import_problem("import:a:c", field="x", where="y") is not None


@pytest.mark.slow
def test_the_kd_accel_script_searches_the_working_directory(tmp_path):
    """Check the console script, as tests of other commands run `python -m kd_accel`, with a function that returns no images."""
    (tmp_path / "mine.py").write_text("def images(split, image_size):\n    return 7\n")
    script = Path(sys.executable).with_name("kd-accel")
    command = [script, "train", "--data.source=import:mine:images"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot import" not in done.stderr and "import:mine:images" in done.stderr


def test_help_describes_the_flag():
    for argv in (["--help"], ["train", "--help"], ["evaluate", "--help"]):
        assert "--allow_import" in say(*argv)
