"""Settings in which runs differ, and texts without the paths of a machine."""

import pytest

from kd_accel.config.schema import DistillConfig, TeacherConfig
from kd_accel.report.run_files import load_run
from kd_accel.report.settings_table import differing_settings, without_machine_paths
from tests.report.runs import finished_run, write_settings


def test_only_settings_that_differ_are_listed(tmp_path):
    runs = [finished_run(tmp_path, name) for name in ("a", "b", "without_config")]
    write_settings(
        runs[0], distill={"alpha": {"start": 0.8, "end": None}, "features": {}}, train={"epochs": 3, "ema_decay": None}
    )
    write_settings(
        runs[1], seed=1, train={"epochs": 4, "ema_decay": 0.9}, teacher={"run": "/home/me/runs/t", "stem": "imagenet"}
    )
    assert differing_settings([load_run(directory, None) for directory in runs]) == [
        ("seed", ["0", "1", None]),
        ("train.epochs", ["3", "4", None]),
        ("train.ema_decay", ["null", "0.9", None]),
        ("distill.alpha.start", ["0.8", None, None]),
        ("teacher.run", [None, "…/runs/t", None]),
    ]


def test_defaults_of_a_section_that_a_run_lacks_are_left_out_but_temperature_and_alpha(tmp_path):
    runs = [finished_run(tmp_path, name) for name in ("a", "b")]
    write_settings(runs[0])
    write_settings(runs[1], distill=DistillConfig().model_dump(mode="json"), teacher=TeacherConfig().model_dump(mode="json"))
    found = dict(differing_settings([load_run(directory, None) for directory in runs]))
    assert found == {"distill.temperature": [None, "4.0"], "distill.alpha": [None, "0.5"]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data/photos", "…/data/photos"),
        ("imagefolder:/home/my name/data/photos", "imagefolder:…/data/photos"),
        ("/x", "…/x"),
        ("[/a/b/c/d, /e/f/g]", "[…/c/d, …/f/g]"),
        ("runs/student", "runs/student"),
        ("torchvision/resnet18", "torchvision/resnet18"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("~/data/x/y", "~/data/x/y"),
    ],
)
def test_absolute_paths_are_shortened(text, shown):
    assert without_machine_paths(text) == shown
