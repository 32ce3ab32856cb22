"""Exact resume: a stopped and resumed training equals one that was never stopped, bit for bit; anything else is refused."""

import json
import shutil

import pytest

from tests.support.launching import metrics, run, summary, train
from tests.support.resuming import EVERYTHING, assert_same_run


# The feature maps of the last layer have 2x2 pixels, or one.
@pytest.mark.parametrize(
    ("processes", "image_size"), [(1, 32), pytest.param(2, 32, marks=[pytest.mark.slow, pytest.mark.proof]), (1, 16)]
)
def test_stop_after_7_of_20_steps_and_resume(tmp_path, distilled, processes, image_size):
    flags = [*EVERYTHING, *distilled, f"--data.image_size={image_size}", f"--teacher.image_size={image_size}"]
    train(tmp_path / "straight", *flags, processes=processes)
    train(tmp_path / "stopped", *flags, "--checkpoint.stop_after_steps=7", processes=processes)
    assert not (tmp_path / "stopped/summary.json").exists()
    train(tmp_path / "stopped", *flags, "--checkpoint.resume=must", processes=processes)
    assert metrics(tmp_path / "straight")[-1]["step"] == 20
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_the_comparison_can_fail(tmp_path):
    for steps in (7, 8):
        train(tmp_path / str(steps), f"--train.max_steps={steps}")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "7", tmp_path / "8")


@pytest.mark.slow
def test_more_processes_resume_with_the_same_samples(tmp_path):
    train(tmp_path / "straight")
    train(tmp_path / "moved", "--checkpoint.stop_after_steps=5")
    done = train(tmp_path / "moved", processes=2)
    assert "was written by 1 processes and is resumed by 2" in done.stdout
    for one, two in zip(metrics(tmp_path / "straight"), metrics(tmp_path / "moved"), strict=True):
        assert one.pop("split") == two.pop("split")
        assert two == pytest.approx(one, rel=1e-4)


def test_starts_in_the_directory_of_an_earlier_run(tmp_path):
    run_dir = tmp_path / "run"
    train(run_dir, "--train.epochs=1", "--checkpoint.keep=3", "--checkpoint.every_steps=4")
    assert "finished already" in train(run_dir, "--train.epochs=1").stdout
    assert "resume: never" in train(run_dir, "--train.epochs=1", "--checkpoint.resume=never", code=2).stderr
    other = train(run_dir, "--optim.lr=0.06", "--train.epochs=1", code=2).stderr
    assert "optim.lr: 0.05 in the run, 0.06 now" in other
    empty = train(tmp_path / "empty", "--checkpoint.resume=must", code=2).stderr
    assert "checkpoint.resume: must" in empty and "no intact checkpoint" in empty
    assert not (tmp_path / "empty").exists()


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    flags = ["--checkpoint.every_steps=3", "--checkpoint.keep=5"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "damaged", *flags, "--checkpoint.stop_after_steps=7")
    weights = tmp_path / "damaged/checkpoints/step-00000007/module.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = train(tmp_path / "damaged", *flags)
    assert "step-00000007 is passed over" in done.stderr
    assert_same_run(tmp_path / "straight", tmp_path / "damaged")


def test_another_teacher_under_the_same_path_is_refused(tmp_path, teacher_run):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_run, teacher)
    flags = [f"--teacher.run={teacher}"]
    train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=3")
    data = bytearray((teacher / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (teacher / "model.safetensors").write_bytes(data)
    refused = train(tmp_path / "run", *flags, code=2).stderr
    assert "was trained with the teacher" in refused and "another run_dir" in refused


def test_other_data_under_the_same_name_is_refused(tmp_path):
    train(tmp_path / "run", "--checkpoint.stop_after_steps=3")
    done = train(tmp_path / "run", code=2, KD_TEST_NOISE_SEED="9")
    assert "was trained on other data (digest:" in done.stderr


@pytest.mark.slow
def test_evaluate_agrees_with_the_summary(tmp_path, distilled):
    train(tmp_path / "run", *EVERYTHING, *distilled, processes=2)
    result = json.loads(run("evaluate", tmp_path / "run").stdout.splitlines()[-1])
    assert result["accuracy"] == summary(tmp_path / "run")["accuracy"]
    assert result["agreement"] == summary(tmp_path / "run")["agreement"]
