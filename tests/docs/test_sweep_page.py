"""docs/sweep.md: its command is accepted, and its code for Optuna trains."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.support.in_process import say
from tests.support.launching import ROOT

PAGE = (ROOT / "docs/sweep.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


class Study:
    """The part of Optuna's study and trials that the page uses: two trials at the ends of the ranges."""

    def optimize(self, function, *, n_trials):
        assert n_trials == 20
        self.values = {}
        for number in range(2):
            trial = SimpleNamespace(number=number, suggest_float=lambda name, *ends, number=number: float(ends[number]))
            self.values[number] = function(trial)

    @property
    def best_params(self):
        return {"number": max(self.values, key=self.values.get)}


@pytest.fixture
def optuna(monkeypatch):
    """A stand-in for Optuna, which is not a dependency."""
    study = Study()
    module = SimpleNamespace(create_study=lambda *, direction: study if direction == "maximize" else None, Trial=object)
    monkeypatch.setitem(sys.modules, "optuna", module)
    return study


def test_the_command_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("student.yaml").write_text(yaml.safe_dump({"data": {"val_fraction": 0.1}, "teacher": {"run": "runs/teacher"}}))
    program, *argv = shlex.split(block("sh"))
    printed = yaml.safe_load(say(*argv, "--print_config"))
    assert program == "kd-accel" and len(printed) == 6
    assert printed["temperature=4,alpha=0.9"]["distill"]["temperature"] == 4


@pytest.mark.slow
def test_the_code_for_optuna_trains(tmp_path, monkeypatch, teacher_run, optuna):
    monkeypatch.chdir(tmp_path)
    small = yaml.safe_load((ROOT / "tests/support/small.yaml").read_text())
    Path("student.yaml").write_text(yaml.safe_dump({**small, "teacher": {"run": str(teacher_run)}}))
    names = {}
    exec(compile(block("python"), "sweep.md", "exec"), names)
    configs = [yaml.safe_load(Path(f"runs/optuna/{number}/config.yaml").read_text())["distill"] for number in range(2)]
    assert [(config["temperature"], config["alpha"]) for config in configs] == [(1, 0.1), (8, 0.9)]
    assert all(0.25 <= value <= 1 for value in optuna.values.values())
