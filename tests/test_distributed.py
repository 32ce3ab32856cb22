"""Launches that are not what they look like: one process in place of several, and no GPU, each started by Accelerate itself."""

import subprocess

import pytest
import torch

from kd_accel.distributed import launch_notices, missing_gpu, start_processes
from tests.support.launching import LAUNCH, ROOT, SMALL, environment, losses

ALONE = "the launcher was asked for several processes, but has started one"
NO_GPU = "launch: no GPU was found ("
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def launched(run_dir, *launcher_flags, **environment_changes):
    """Train for one step through Accelerate's launcher."""
    program = ["-m", "kd_accel", "train", f"--run_dir={run_dir}", *SMALL, "--train.max_steps=1"]
    return subprocess.run(
        [*LAUNCH, *launcher_flags, *program],
        cwd=ROOT,
        env=environment(**environment_changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.proof
@needs_no_gpu
def test_a_launch_of_two_processes_that_starts_one_is_refused(tmp_path):
    done = launched(tmp_path / "run", "--num_processes", "2")
    assert done.returncode != 0 and done.stderr.count(f"kd-accel: {ALONE}") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_flag_for_the_cpu_starts_one_process_and_is_refused(tmp_path):
    assert ALONE in launched(tmp_path / "run", "--cpu", "--num_processes", "2").stderr
    done = launched(tmp_path / "run", "--cpu", "--num_processes", "1")
    assert done.returncode == 0 and NO_GPU not in done.stdout, done.stderr


@pytest.mark.slow
def test_an_address_that_the_launcher_has_inherited_is_no_sign_of_several_processes(tmp_path):
    done = launched(tmp_path / "run", "--cpu", "--num_processes", "1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert done.returncode == 0 and len(losses(tmp_path / "run")) == 1, done.stderr


@pytest.mark.slow
@pytest.mark.proof
@needs_no_gpu
def test_a_launch_file_for_gpus_without_a_gpu_is_reported(tmp_path):
    done = launched(tmp_path / "run", "--config_file", "launch/gpu1.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NO_GPU) == 1 and "so the process of this launch runs on the CPU; check nvidia-smi" in done.stdout


@pytest.mark.slow
@needs_no_gpu
def test_a_launch_file_for_eight_gpus_without_a_gpu_is_reported_once(tmp_path):
    done = launched(tmp_path / "run", "--config_file", "launch/gpu8.yaml", "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(NO_GPU) == 1 and "so the 2 processes of this launch run on the CPU" in done.stdout


@needs_no_gpu
@pytest.mark.parametrize(
    ("variables", "is_reported"),
    [
        ({}, False),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, True),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}, True),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "True"}, False),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "CUDA_VISIBLE_DEVICES": "-1,-1"}, False),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO", "CUDA_VISIBLE_DEVICES": ""}, False),
    ],
    ids=str,
)
def test_only_a_launcher_that_was_not_told_to_use_the_cpu_is_reported(monkeypatch, variables, is_reported):
    accelerator = start_processes("float32")
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [notice.startswith(NO_GPU) for notice in launch_notices(accelerator)] == ([True] if is_reported else [])


@needs_no_gpu
def test_the_reason_why_there_is_no_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    version = f"PyTorch {torch.__version__}"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert missing_gpu() == f"{version} finds none"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert missing_gpu() == "CUDA_VISIBLE_DEVICES is ''"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert missing_gpu() == f"{version} is built without CUDA"


def test_a_process_without_the_launcher_is_not_alone(monkeypatch):
    """The variables of the start count, not those that a program has set since."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert start_processes("float32").num_processes == 1
