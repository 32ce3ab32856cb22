"""Names of the hardware in a bench file."""

import platform
from pathlib import Path

import pytest
import torch

from kd_accel.bench import environment
from kd_accel.bench.environment import cpu_name
from kd_accel.config.schema import BenchConfig


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("processor\t: 0\nmodel\t\t: 1\nmodel name\t: Chip: 9000 @ 2 GHz\nmodel name\t: Other\n", "Chip: 9000 @ 2 GHz"),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_cpu_is_named(tmp_path, monkeypatch, content, expected):
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(environment, "_CPU_INFO", path)
    assert cpu_name() == expected != ""


def test_environment_has_cpu_gpu_and_threads():
    found = environment.environment(BenchConfig(), torch.device("cpu"))
    assert found["hardware"]["cpu"] == cpu_name() and found["hardware"]["gpu"] is None
    assert found["threads"] == torch.get_num_threads() and found["device"] == "cpu"
    if Path("/proc/cpuinfo").exists() and platform.machine() == "x86_64":
        assert cpu_name() in Path("/proc/cpuinfo").read_text()


def test_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    found = environment.environment(BenchConfig(), torch.device("cuda:1"))
    assert found["device"] == found["hardware"]["gpu"] == "GPU 1"
    assert found["hardware"]["cpu"] == cpu_name()
