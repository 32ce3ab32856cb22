"""One process or two, one forward or four: the same rows in the same steps, the same losses, the same gradients."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import LAUNCH, ROOT, environment, losses, metrics, run, summary, train

pytestmark = pytest.mark.slow


def test_two_processes_train_what_one_does(tmp_path, distilled):
    train(tmp_path / "one", *distilled)
    train(tmp_path / "two", *distilled, processes=2)
    assert len(losses(tmp_path / "one")) == 24
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert summary(tmp_path / "two")["world_size"] == 2
    explained = summary(tmp_path / "two")["pca_explained"]
    assert explained.keys() == {"layer1", "layer2"}
    assert all(0.3 < share <= 1 for share in explained.values())
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.pop("split") == two.pop("split")
        assert two == pytest.approx(one, rel=1e-3)


def test_in_float64_they_agree_to_rounding(tmp_path):
    flags = ["--model.arch=import:tests.own_models:student_float64", "--train.max_steps=20"]
    train(tmp_path / "one", *flags)
    train(tmp_path / "two", *flags, processes=2)
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-10)


def test_accumulation_is_the_big_batch(tmp_path):
    flags = ["--model.arch=import:tests.own_models:student_float64", "--train.max_steps=8"]
    for processes, accumulation in ((1, 1), (1, 4), (2, 2)):
        train(
            tmp_path / f"{processes}x{accumulation}",
            *flags,
            f"--train.grad_accum_steps={accumulation}",
            processes=processes,
        )
    reference = losses(tmp_path / "1x1")
    assert len(reference) == 8
    assert losses(tmp_path / "1x4") == pytest.approx(reference, rel=1e-10)
    assert losses(tmp_path / "2x2") == pytest.approx(reference, rel=1e-10)


def test_four_processes_are_four_accumulation_steps(tmp_path):
    flags = ["--train.max_steps=5", "--data.val_fraction=0"]
    train(tmp_path / "4x1", *flags, processes=4)
    train(tmp_path / "1x4", *flags, "--train.grad_accum_steps=4")
    assert losses(tmp_path / "4x1") == pytest.approx(losses(tmp_path / "1x4"), rel=1e-4)


def test_gradients_differ_before_the_exchange_and_agree_after_it(tmp_path):
    done = subprocess.run(
        [*LAUNCH, "--config_file", "launch/cpu2.yaml", "-m", "tests.gradient_exchange", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    zero, one = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    assert zero.keys() == one.keys()
    names = {name.partition("|")[2] for name in zero}
    assert len(names) == 10  # six of the student, four of its projectors
    for name in names:
        assert not torch.equal(zero[f"before|{name}"], one[f"before|{name}"])
        assert torch.equal(zero[f"after|{name}"], one[f"after|{name}"])


def test_evaluation_counts_each_row_once(tmp_path, teacher_run):
    results = []
    for processes in (1, 2, 3):
        done = run("evaluate", teacher_run, processes=processes)
        results.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
    assert [result["rows"] for result in results] == [41, 41, 41]
    assert len({result["accuracy"] for result in results}) == 1
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    assert results[2]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    assert results[0]["accuracy"] == summary(teacher_run)["accuracy"]


def test_a_launch_that_is_incomplete_is_refused(tmp_path):
    done = train(tmp_path / "run", code=2, WORLD_SIZE="2")
    assert "the launch is incomplete" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_launch_that_was_not_joined_is_refused():
    program = (
        "from accelerate import Accelerator; from kd_accel.engine.setup import refuse_unjoined; refuse_unjoined(Accelerator())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(WORLD_SIZE="2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the launcher started 2 processes, but Accelerate joined 1" in done.stderr


def test_a_batch_that_does_not_divide_by_the_processes(tmp_path):
    done = train(tmp_path / "run", "--train.batch_size=15", processes=2, code=None)
    assert done.stderr.count("kd-accel: train.batch_size: 15 does not divide by 2 processes x 1 accumulation steps") == 1
