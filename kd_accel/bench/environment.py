"""Environment of a benchmark: names of CPU and GPU, threads, kernels, versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torchvision

from kd_accel.config.schema import BenchConfig
from kd_accel.models.inference import image_memory_format

_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CPU_INFO = Path("/proc/cpuinfo")


def environment(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Return what a latency depends on in addition to the model, as JSON values."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    is_channels_last = image_memory_format(config.channels_last, device) == torch.channels_last
    return {
        "device": gpu or "cpu",
        "precision": config.precision,
        "dtype": _DTYPES[config.precision],
        "memory_format": "channels_last" if is_channels_last else "contiguous",
        "compile": config.compile,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "tf32": _tf32(device),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "cpu": cpu_name(), "gpu": gpu},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda,
            **({"onnxruntime": metadata.version("onnxruntime")} if config.onnx else {}),
        },
    }


def cpu_name() -> str:
    """Return the model name of the CPU, on Linux from /proc/cpuinfo; where it is not found, the machine type."""
    return _name_in_cpu_info() or platform.processor() or platform.machine()


def _name_in_cpu_info() -> str:
    """Return the first model name in /proc/cpuinfo; empty on other systems, and for CPUs that have none there (ARM)."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    entries = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in entries if key.strip() == "model name"), "")


def _tf32(device: torch.device) -> dict[str, bool | None]:
    """Return whether float32 convolutions and matrix products may use TF32, by PyTorch's two switches; None on a CPU."""
    if device.type == "cpu":
        return {"convolutions": None, "matmul": None}
    # With 0, NVIDIA's libraries never use TF32, regardless of PyTorch's switches.
    is_allowed = os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    return {
        "convolutions": is_allowed and torch.backends.cudnn.allow_tf32,
        "matmul": is_allowed and torch.backends.cuda.matmul.allow_tf32,
    }
