"""Check of the teacher's accuracy against chance: the bound, and a training or a build that stops before it is paid for."""

import math

import numpy as np
import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.weights import ModelCard, save_model
from kd_accel.teacher.accuracy import check_accuracy
from tests.support.in_process import cache, train
from tests.support.launching import run, summary

ARCH = "import:tests.support.models:teacher"
CLASSES = ["red", "green", "blue", "olive"]


@pytest.fixture(scope="module")
def constant_run(tmp_path_factory):
    """A run whose model predicts the first class for every image, which is right for 11 of the 41 test samples."""
    directory = tmp_path_factory.mktemp("constant")
    model = build_model(ARCH, num_classes=4)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0])
    save_model(directory, model, card=ModelCard(ARCH, "imagenet", {}, CLASSES, [0.5] * 3, [0.2] * 3, 32))
    return directory


def test_the_bound_is_two_standard_errors_above_the_share_of_the_largest_class():
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    bound = 0.5 + 2 * math.sqrt(0.25 / 100)
    assert check_accuracy(bound, labels, "auto") == []
    with pytest.raises(UserError) as caught:
        check_accuracy(bound - 1e-6, labels, "auto")
    assert str(caught.value).startswith(
        "teacher.min_accuracy: the teacher's accuracy on 100 test samples is 60.00 %, and must be at least 60.00 % (auto: two "
        "standard errors above the share of the largest class, 50.00 %). Check that its classes are in the order of the data"
    )
    assert str(caught.value).endswith("set teacher.min_accuracy to null to use it nevertheless")


def test_samples_without_a_label_are_not_counted():
    labels = np.repeat([0, 1, -1], [50, 50, 900])
    with pytest.raises(UserError, match="on 100 test samples is 59.00 %, and must be at least 60.00 %"):
        check_accuracy(0.59, labels, "auto")
    assert check_accuracy(0.0, labels[100:], "auto") == []


def test_a_number_or_null_replaces_the_bound():
    labels = np.repeat([0, 1], [50, 50])
    assert check_accuracy(0.1, labels, 0.1) == check_accuracy(0.0, labels, None) == []
    with pytest.raises(UserError, match=r"is 70.00 %, and must be at least 75.00 % \(0.75\)"):
        check_accuracy(0.7, labels, 0.75)


@pytest.mark.parametrize("counts", [(5,), (3, 1), (95, 5)])
def test_too_few_samples_of_a_second_class_are_noticed(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    if sum(counts) == 100:
        assert check_accuracy(1.0, labels, "auto") == []
        return
    (notice,) = check_accuracy(0.2, labels, "auto")
    assert "teacher.min_accuracy: auto has no effect" in notice and f"{sum(counts)} test samples" in notice


def test_a_training_with_a_constant_teacher_stops_before_the_first_step(tmp_path, constant_run):
    flags = [f"--teacher.run={constant_run}", "--train.max_steps=2"]
    said = train(tmp_path / "run", *flags, code=2)
    assert (
        "teacher.min_accuracy: the teacher's accuracy on 41 test samples is 26.83 %, and must be at least 40.67 % (auto: "
        in said
    )
    assert not (tmp_path / "run/checkpoints").exists() or not any((tmp_path / "run/checkpoints").iterdir())
    train(tmp_path / "run", *flags, "--teacher.min_accuracy=null")
    assert summary(tmp_path / "run")["steps"] == 2


def test_the_build_of_a_cache_with_a_constant_teacher_stops_before_a_file_is_written(tmp_path, constant_run):
    flags = [
        f"--teacher.run={constant_run}",
        "--data.views=1",
        "--teacher.outputs=cached",
        f"--teacher.cache.dir={tmp_path}/cache",
    ]
    said = cache("build", *flags, code=2)
    assert "teacher.min_accuracy: the teacher's accuracy on 41 test samples" in said
    assert not list((tmp_path / "cache").glob("**/*.safetensors"))
    cache("build", *flags, "--teacher.min_accuracy=null")
    assert "nothing to do" in cache("build", *flags), "an existing cache is not checked again"
    assert "teacher.min_accuracy: the teacher's" in train(tmp_path / "run", *flags, "--train.epochs=1", code=2)


@pytest.mark.slow
def test_two_processes_stop_with_one_message(tmp_path, constant_run):
    flags = ["--data.source=import:tests.support.models:images", "--data.transform=crop_flip", "--tracking.wandb=disabled"]
    model = "--model.arch=import:tests.support.models:student"
    done = run("train", f"--run_dir={tmp_path}/run", *flags, model, f"--teacher.run={constant_run}", processes=2, code=None)
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("kd-accel: ")]
    assert message.startswith("kd-accel: teacher.min_accuracy: the teacher's accuracy on 41 test samples is 26.83 %")
