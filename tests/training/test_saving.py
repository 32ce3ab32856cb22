"""Failed writes of checkpoints: reported at the next step, not at the next checkpoint, by all ranks at the same step."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.training.checkpoint import CheckpointWriter, find_checkpoint
from kd_accel.training.saving import _bits_sum, _refuse_not_finite, _refuse_unequal
from tests.support.holding import wait_until
from tests.support.launching import ROOT, SMALL, environment, free_port, metrics, train

SLOW_STEPS = [
    "--model.arch=import:tests.support.models:slow_teacher",
    "--data.val_fraction=0",
    "--train.max_steps=12",
    "--checkpoint.every_steps=5",
]
"""Steps that take longer than the failing write of a checkpoint."""


@pytest.fixture
def small_disk(tmp_path):
    """A file system on which config.yaml and metrics.jsonl fit, and a checkpoint does not until `ballast` is removed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    (disk / "ballast").write_bytes(bytes(350 * 1024))
    yield disk
    subprocess.run(["umount", disk], check=True)


def check_report(stderr, run_dir, *, last_step):
    """Check the message, and that the training has ended by a step."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("kd-accel: ")]
    assert line.startswith(f"kd-accel: checkpoint: cannot write {run_dir}/checkpoints/step-00000005 (")
    assert "No space left" in line and "Traceback" not in stderr
    assert 5 <= metrics(run_dir)[-1]["step"] <= last_step


def test_a_full_disk_is_reported_at_the_next_step_and_the_run_resumes(tmp_path, small_disk):
    run_dir = small_disk / "run"
    check_report(train(run_dir, *SLOW_STEPS, code=2, KD_TEST_FORWARD_S="0.2").stderr, run_dir, last_step=6)
    (small_disk / "ballast").unlink()
    train(run_dir, *SLOW_STEPS)
    train(tmp_path / "straight", *SLOW_STEPS)
    assert (run_dir / "model.safetensors").read_bytes() == (tmp_path / "straight/model.safetensors").read_bytes()


@pytest.mark.slow
def test_all_ranks_report_a_full_disk_at_the_same_step(small_disk):
    """The processes are started without a launcher, which would end the second one when the first one ends.

    Steps of half a second or more are followed by an exchange each.
    """
    run_dir = small_disk / "run"
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "KD_TEST_FORWARD_S": "0.5"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "kd_accel", "train", f"--run_dir={run_dir}", *SMALL, *SLOW_STEPS],
            cwd=ROOT,
            env=environment(**launch, RANK=rank, LOCAL_RANK=rank),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    stderrs = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], stderrs
    for stderr in stderrs:  # the exchange of the ranks takes one step more
        check_report(stderr, run_dir, last_step=7)


def test_the_failure_of_a_write_is_seen_without_waiting(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter()
    writer.write(tmp_path / "checkpoints", step=1, tensors={}, state={}, keep=1)
    writer.wait()
    assert not writer.has_failed
    writer.write(tmp_path / "file/x", step=1, tensors={}, state={}, keep=1)
    wait_until(lambda: writer.has_failed, timeout_s=60)
    with pytest.raises(UserError, match="cannot write"):
        writer.wait()
    assert not writer.has_failed
    writer.close()
    assert find_checkpoint(tmp_path / "checkpoints") is not None


def rank_0(other):
    """Return the accelerator of rank 0 of two, which gathers the sums of rank 1, with other weights, too."""
    return SimpleNamespace(gather=lambda own: torch.cat([own, *(_bits_sum(weight).view(1) for weight in other.values())]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_bit_that_differs_between_ranks_is_found(dtype):
    weights = {"first": torch.randn(2, 3, 4, 4, dtype=dtype), "second": torch.randn(5, dtype=dtype)}
    in_other_order = {name: weight.clone() for name, weight in weights.items()}
    in_other_order["first"] = in_other_order["first"].to(memory_format=torch.channels_last)
    _refuse_unequal(weights, rank_0(in_other_order), step=3)
    other = {name: weight.clone() for name, weight in weights.items()}
    other["second"].view(torch.uint8)[-1] ^= 128
    with pytest.raises(UserError, match=r"rank 1 differ from those of rank 0 after step 3 \(first in second\)"):
        _refuse_unequal(weights, rank_0(other), step=3)


def test_finite_weights_whose_norm_overflows_are_saved():
    weights = {"first": torch.ones(3), "second": torch.full((4,), 3e38)}
    _refuse_not_finite(weights, step=3)
    weights["second"][1] = torch.inf
    with pytest.raises(UserError, match="^second is not finite after step 3: "):
        _refuse_not_finite(weights, step=3)
