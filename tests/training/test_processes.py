"""Equality of trainings with different numbers of processes and accumulation steps, and failures of a launch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kd_accel.losses.distiller import Distiller
from kd_accel.training.state import needs_buffers_exchanged
from tests.support import models
from tests.support.holding import Hold
from tests.support.launching import (
    LAUNCH,
    ROOT,
    SMALL,
    environment,
    free_port,
    kill_all,
    last_lines,
    losses,
    metrics,
    run,
    start,
    summary,
    train,
)


@pytest.mark.slow
@pytest.mark.proof
def test_two_processes_train_what_one_does(tmp_path, distilled):
    train(tmp_path / "one", *distilled)
    train(tmp_path / "two", *distilled, processes=2)
    assert len(losses(tmp_path / "one")) == 24
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert summary(tmp_path / "two")["world_size"] == 2
    explained = summary(tmp_path / "two")["explained"]
    assert explained.keys() == {"layer1", "layer2"}
    assert all(0.3 < share <= 1 for share in explained.values())
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one.pop("split") == two.pop("split")
        assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
def test_in_float64_they_agree_to_rounding(tmp_path):
    flags = ["--model.arch=import:tests.support.models:student_float64", "--train.max_steps=20"]
    train(tmp_path / "one", *flags)
    train(tmp_path / "two", *flags, processes=2)
    assert len(losses(tmp_path / "one")) == 20
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-10)


@pytest.mark.slow
@pytest.mark.proof
def test_accumulation_is_the_big_batch(tmp_path):
    flags = ["--model.arch=import:tests.support.models:student_float64", "--train.max_steps=8"]
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


@pytest.mark.slow
def test_four_processes_are_four_accumulation_steps(tmp_path):
    flags = ["--train.max_steps=5", "--data.val_fraction=0"]
    train(tmp_path / "4x1", *flags, processes=4)
    train(tmp_path / "1x4", *flags, "--train.grad_accum_steps=4")
    assert losses(tmp_path / "4x1") == pytest.approx(losses(tmp_path / "1x4"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.proof
def test_gradients_differ_before_the_exchange_and_agree_after_it(tmp_path):
    done = subprocess.run(
        [*LAUNCH, "--config_file", "launch/cpu2.yaml", "-m", "tests.support.gradient_exchange", str(tmp_path)],
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


@pytest.mark.slow
def test_buffers_that_no_training_forward_reads_are_not_exchanged(tmp_path):
    """The bytes of the saved model and the losses of training and validation are the same as with the exchange."""
    for name in ("student_with_everything", "student_with_a_constant"):
        arch = f"import:tests.support.models:{name}"
        distiller = Distiller(getattr(models, name)(4), mean=[0.5] * 3, std=[0.25] * 3)
        assert needs_buffers_exchanged(distiller) == (name == "student_with_a_constant")
        train(tmp_path / name, f"--model.arch={arch}", processes=2)
    without, exchanged = tmp_path / "student_with_everything", tmp_path / "student_with_a_constant"
    assert (without / "model.safetensors").read_bytes() == (exchanged / "model.safetensors").read_bytes()
    assert metrics(without) == metrics(exchanged)


@pytest.mark.slow
@pytest.mark.proof
def test_evaluation_counts_each_sample_once(tmp_path, teacher_run):
    results = []
    for processes in (1, 2, 3):
        done = run("evaluate", teacher_run, processes=processes)
        results.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
    assert [result["samples"] for result in results] == [41, 41, 41]
    assert len({result["accuracy"] for result in results}) == 1
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    assert results[2]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    assert results[0]["accuracy"] == summary(teacher_run)["accuracy"]


def test_a_launch_that_is_incomplete_is_refused(tmp_path):
    done = train(tmp_path / "run", code=2, WORLD_SIZE="2")
    assert "the launch is incomplete" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.proof
def test_a_launch_that_was_not_joined_is_refused():
    program = (
        "from accelerate import Accelerator; from kd_accel.distributed import refuse_unjoined; refuse_unjoined(Accelerator())"
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


@pytest.mark.slow
def test_a_batch_that_does_not_divide_by_the_processes(tmp_path):
    done = train(tmp_path / "run", "--train.batch_size=15", processes=2, code=None)
    text = "train.batch_size: 15 must be a multiple of 2 (2 processes x 1 accumulation steps)"
    assert done.stderr.count(f"kd-accel: {text}") == 1 and text in last_lines(done.stderr)


@pytest.mark.slow
@pytest.mark.proof
def test_launcher_ends_with_a_wrong_setting(tmp_path):
    done = train(tmp_path / "run", "--train.epoch=3", processes=2, code=None)
    text = "--train.epoch: no such setting; did you mean --train.epochs?"
    assert done.stderr.count(f"kd-accel: {text}") == 1
    assert last_lines(done.stderr).splitlines()[-2] == f"  {text}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_error_ends_a_training_with_workers(tmp_path, processes):
    """A worker that ignored SIGTERM from its parent would block the parent's exit."""
    step_3 = Hold(tmp_path / "hold", step=3).environment
    argv = ["train", f"--run_dir={tmp_path / 'run'}", *SMALL, "--data.num_workers=1"]
    process = start(*argv, processes=processes, patch="breaks", **step_3)
    try:
        _, stderr = process.communicate(timeout=120)
    finally:
        kill_all(process)
    assert process.returncode == 1
    lines = (last_lines(stderr) if processes > 1 else stderr).splitlines()
    assert lines[-1 if processes == 1 else -2].strip() == "ZeroDivisionError"


@pytest.mark.slow
def test_an_unforeseen_failure_of_rank_0_reaches_its_peers_at_once(tmp_path):
    """Without the message, the peers would wait until their timeout of half an hour."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.patched_program", "fails", "train", f"--run_dir={tmp_path / 'run'}", *SMALL],
            cwd=ROOT,
            env=environment(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert "Traceback" in outputs[0] and outputs[0].rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")
    assert "kd-accel: rank 0 has failed (ZeroDivisionError: integer division or modulo by zero)" in outputs[1]
    assert "Traceback" not in outputs[1]


@pytest.mark.slow
def test_ranks_may_end_a_build_far_apart_and_each_flushes_its_own_files(tmp_path):
    """Rank 1 takes three times as long as the timeout of other exchanges."""
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    train(teacher, "--role=teacher", "--model.arch=import:tests.support.models:late_teacher", "--train.max_steps=2")
    features = "--distill.features.mse={layers: [layer1, layer2], args: {direction: student_to_teacher}}"
    outputs = [
        f"--teacher.run={teacher}",
        "--teacher.outputs=cached",
        "--teacher.cache.batch_size=16",
        "--teacher.cache.shard_mib=0.04",
    ]
    flags = [*outputs, features, "--data.views=2", f"--teacher.cache.dir={cache}", "--train.timeout_s=8"]
    hold = Hold(tmp_path / "hold", step=0)  # holds no training; both ranks begin together
    done = subprocess.run(
        [
            *(*LAUNCH, "--config_file", "launch/cpu2.yaml", "-m", "tests.support.patched_program", "flushes"),
            *("cache", "build", *SMALL, *flags),
        ],
        cwd=ROOT,
        env=environment(KD_TEST_FORWARD_S="2", KD_TEST_FLUSHES=str(tmp_path / "flushed"), **hold.environment),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    flushed = [Path(f"{tmp_path / 'flushed'}-{rank}").read_text().splitlines() for rank in (0, 1)]
    shards = [[Path(name) for name in names if "/view-" in name and name.endswith(".safetensors")] for names in flushed]
    assert sorted(shards[0] + shards[1]) == sorted(cache.glob("*/view-*/*.safetensors"))
    assert len(shards[0]) > 5 and len(shards[1]) > 5
    before = {path: path.read_bytes() for path in cache.glob("*/view-*/*.safetensors")}
    cache_of_one = tmp_path / "one"
    run("cache", "build", *SMALL, *outputs, features, "--data.views=2", f"--teacher.cache.dir={cache_of_one}")
    assert {path.relative_to(cache): data for path, data in before.items()} == {
        path.relative_to(cache_of_one): path.read_bytes() for path in cache_of_one.glob("*/view-*/*.safetensors")
    }
