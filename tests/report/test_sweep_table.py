"""Table of a sweep: means and deviations, the choice by validation accuracy, and unfinished trials."""

import json
from pathlib import Path

import pytest

from kd_accel.errors import UserError
from kd_accel.report.sweep_table import SweepRun, TrialResult, best_trial, read_run, sweep_table, write_sweep_report


def trial(name, *accuracies):
    """Result of a trial, from pairs of validation and test accuracy."""
    runs = [SweepRun(seed, Path(f"{name}-seed{seed}"), val, test) for seed, (val, test) in enumerate(accuracies)]
    return TrialResult(name, {"optim.lr": name}, runs)


A, B = trial("a", (0.5, 0.9), (0.6, 0.8)), trial("b", (0.58, 0.1), (0.56, 0.2))


def test_mean_and_deviation_are_those_of_the_seeds():
    rows = sweep_table([A, B], num_seeds=2).splitlines()
    assert rows[0] == "| optim.lr | Validation accuracy (%) | Test accuracy (%) | Seeds |"
    assert rows[2:] == ["| a | 55.00 ± 7.07 | 85.00 ± 7.07 | 2 |", "| b | 57.00 ± 1.41 | 15.00 ± 7.07 | 2 |"]
    assert sweep_table([trial("a", (0.5, None))], num_seeds=1).splitlines()[2] == "| a | 50.00 |  | 1 |"


def test_the_validation_split_chooses_and_never_the_test_split():
    assert best_trial([A, B], num_seeds=2) is B
    assert best_trial([B, trial("c", *[(0.57, 1.0)] * 2)], num_seeds=2) is B
    assert best_trial([A, trial("c", (None, 0.9), (0.9, 0.9))], num_seeds=2) is None
    assert best_trial([A, trial("c", (0.9, 0.9))], num_seeds=2) is None


def test_an_unfinished_sweep_has_its_finished_runs_and_no_choice(tmp_path):
    text = write_sweep_report([A, trial("b", (0.9, 0.9)), trial("c")], num_seeds=2, out=tmp_path)
    assert text.splitlines()[3:] == ["| b | 90.00 | 90.00 | 1 of 2 |", "| c |  |  | 0 of 2 |"]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["best"] is None and [each["n"] for each in content["trials"]] == [2, 1, 0]
    assert content["trials"][1]["val_accuracy"] == {"mean": 0.9, "std": None}
    assert content["trials"][0]["runs"][1] == {
        **{"seed": 1, "directory": "a-seed1", "val_accuracy": 0.6, "test_accuracy": 0.8},
    }
    finished = write_sweep_report([A, B], num_seeds=2, out=tmp_path)
    assert finished.endswith("Best mean validation accuracy: b") and (tmp_path / "results.md").read_text() == f"{finished}\n"


@pytest.fixture
def run_dir(tmp_path):
    """Function that writes the files of a run with two evaluations on the validation samples."""

    def write(**more):
        summary = {"name": "x", "role": "student", "arch": "a", "accuracy": 0.4, "parameters": 1, "accuracy_best_val": 0.7}
        lines = [{"step": 1, "epoch": epoch, "split": "val", "accuracy": value} for epoch, value in ((1, 0.7), (2, 0.6))]
        (tmp_path / "summary.json").write_text(json.dumps({**summary, **more}))
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return tmp_path

    return write


def test_accuracies_are_those_of_the_same_weights(run_dir):
    assert read_run(run_dir(), seed=3) == SweepRun(3, run_dir(), 0.6, 0.4)
    assert read_run(run_dir(accuracy_best=0.5), seed=3) == SweepRun(3, run_dir(), 0.7, 0.5)


def test_a_damaged_accuracy_is_named(run_dir):
    with pytest.raises(UserError, match="an accuracy is damaged"):
        read_run(run_dir(accuracy_best=0.5, accuracy_best_val={"x": 1}), seed=0)
