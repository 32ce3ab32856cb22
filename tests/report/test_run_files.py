"""Files of finished and unfinished runs."""

import json

import pytest

from kd_accel.errors import UserError
from kd_accel.report.run_files import load_result, load_run
from tests.report.runs import finished_run, unfinished_run, write_settings


def test_progress_of_an_unfinished_run(tmp_path):
    row = load_run(unfinished_run(tmp_path, "a"), None).row
    assert (row.step, row.steps, row.status) == (4, 6, "unfinished, step 4 of 6")
    row = load_run(unfinished_run(tmp_path, "b", train={"epochs": 9, "max_steps": 7}), None).row
    assert row.status == "unfinished, step 4 of 7"
    directory = unfinished_run(tmp_path, "c")
    (directory / "metrics.jsonl").write_text('{"step": 3, "epoch": 0, "split": "train", "loss": 1.0}\n')
    assert load_run(directory, None).row.status == "unfinished, step 3"
    (directory / "metrics.jsonl").write_text("")
    assert load_run(directory, None).row.status == "unfinished, step 0"


@pytest.mark.parametrize(
    ("changes", "role"),
    [
        ({}, "student"),
        ({"role": "teacher"}, "teacher"),
        ({"teacher": {"run": "x"}}, "distilled"),
        ({"teachers": {}}, "student"),
    ],
)
def test_role_of_an_unfinished_run(tmp_path, changes, role):
    assert load_run(unfinished_run(tmp_path, "a", **changes), None).row.role == role


def test_the_incomplete_last_line_belongs_to_a_running_training_alone(tmp_path):
    directory = unfinished_run(tmp_path, "a")
    assert [line["step"] for line in load_run(directory, None).curve] == [1, 2, 3, 4, 4, 4]
    (directory / "summary.json").write_text((finished_run(tmp_path, "b") / "summary.json").read_text())
    with pytest.raises(UserError, match="metrics.jsonl: is damaged .a line is not valid JSON"):
        load_run(directory, None)


def test_a_sweep_still_refuses_an_unfinished_run(tmp_path):
    with pytest.raises(UserError, match="summary.json: cannot be read .* not a finished run"):
        load_result(unfinished_run(tmp_path, "a"), None)


def test_an_unfinished_run_without_settings_is_refused(tmp_path):
    directory = unfinished_run(tmp_path, "a")
    (directory / "config.yaml").write_text("a: !!python/name:os.system\n")
    with pytest.raises(UserError, match="config.yaml: is damaged, and the run is not finished; train it first"):
        load_run(directory, None)


def test_settings_are_optional_for_a_finished_run(tmp_path):
    directory = finished_run(tmp_path, "a")
    assert load_run(directory, None).settings == {}
    write_settings(directory, seed=3)
    found = load_run(directory, None)
    assert found.row.seed == 3 and found.settings["train.epochs"] == 3


@pytest.mark.parametrize(
    "change",
    [{"agreement": "x"}, {"accuracy": float("nan")}, {"accuracy_best": [1]}, {"teacher_accuracy": {}}, {"best_epoch": "a"}],
)
def test_damaged_figures_of_a_summary_are_refused(tmp_path, change):
    directory = finished_run(tmp_path, "a", **change)
    with pytest.raises(UserError, match="summary.json: is damaged .*; train the run again"):
        load_run(directory, None)


@pytest.mark.parametrize("data", [[], None, {"label_names": 3}, {"test": 4}])
def test_other_parts_of_a_summary_may_be_anything(tmp_path, data):
    assert load_run(finished_run(tmp_path, "a", data=data), None).class_names == []


@pytest.mark.parametrize("name", ["ce", "lr", "temperature", "alpha"])
def test_each_metric_of_a_figure_is_a_number(tmp_path, name):
    directory = finished_run(tmp_path, "a")
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 0, "split": "train", name: "x"}) + "\n")
    with pytest.raises(UserError, match="a line without step, epoch and split"):
        load_run(directory, None)
