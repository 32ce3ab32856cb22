"""Benchmark of models by name: runs, loaded from their files for deployment, and architectures with random weights.

In: names and a `BenchConfig`. Out: a dict for a JSON file, with the settings, the environment (device, dtype, threads, kernels,
versions), and for each model its parameters, bytes, multiply-adds and latency per batch size. Kernels and memory format are
those of training, but modules are not replaced by kd_accel's faster ones: they are measured as a user deploys them. A report
identifies a run by its path and the digest of its files.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from kd_accel.bench.latency import compile_for_latency, measure_latency
from kd_accel.bench.model_stats import count_macs, count_parameters, model_bytes
from kd_accel.bench.provenance import model_digest
from kd_accel.config.schema import BenchConfig
from kd_accel.errors import UserError, describe_error
from kd_accel.models.factory import build_model
from kd_accel.models.inference import choose_kernels, image_memory_format
from kd_accel.models.weights import load_run_model

_DEFAULT_IMAGE_SIZE = 32
_ARCH_PREFIXES = ("torchvision/", "timm/", "import:")
_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class _LoadedModel:
    """Model to measure.

    Attributes:
        name: Name given by the user.
        arch: Architecture.
        model: The network, in evaluation mode.
        image_size: Height and width of its images, in pixels.
        digest: Digest of the files of a run; None for an architecture.
    """

    name: str
    arch: str
    model: nn.Module
    image_size: int
    digest: str | None = None


def bench_models(names: Sequence[str], config: BenchConfig) -> dict[str, Any]:
    """Measure models.

    Args:
        names: Run directories, or architectures: torchvision/NAME, timm/NAME, import:package.module:function.
        config: Settings of the benchmark.

    Returns:
        {"settings": ..., environment ..., "models": [...]} of JSON values; see the module's docstring.

    Raises:
        UserError: If a model cannot be loaded, or a setting is not valid on this machine. Nothing is timed before.
    """
    choose_kernels(deterministic=False, tf32=config.tf32)
    device = _device(config.device)
    if config.precision == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 needs a GPU; use bf16 or float32")
    if config.cuda_graph and device.type == "cpu":
        raise UserError("cuda_graph: true needs a GPU; leave it out")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = [_load(name, config) for name in names]
    counts = [_counts(entry) for entry in loaded]
    latency = _latencies(loaded, config, device)
    entries = [
        {**_identity(entry), **counted, "latency": measured}
        for entry, counted, measured in zip(loaded, counts, latency, strict=True)
    ]
    return {"settings": config.model_dump(mode="json"), **_environment(config, device), "models": entries}


def _load(name: str, config: BenchConfig) -> _LoadedModel:
    path = Path(name)
    if path.is_dir():
        model, card = load_run_model(path, field=name)
        return _LoadedModel(str(path), card.arch, model, config.image_size or card.image_size, model_digest(path))
    if not name.startswith(_ARCH_PREFIXES):
        raise UserError(
            f"bench: run directory {name!r} not found; give a run directory, or an architecture as torchvision/NAME, timm/NAME "
            "or import:package.module:function"
        )
    model = build_model(name, num_classes=config.num_classes, field="bench").eval()
    return _LoadedModel(name, name, model, config.image_size or _DEFAULT_IMAGE_SIZE)


def _identity(entry: _LoadedModel) -> dict[str, Any]:
    return {"name": entry.name, "arch": entry.arch, "digest": entry.digest, "image_size": entry.image_size}


def _counts(entry: _LoadedModel) -> dict[str, int]:
    """Count parameters, bytes and multiply-adds, on the CPU and before compilation.

    Raises:
        UserError: If the model does not accept images of this size, which its first forward shows.
    """
    images = _images(1, entry.image_size)
    try:
        macs = count_macs(entry.model, images)
    except (AssertionError, RuntimeError, ValueError) as error:
        size = entry.image_size
        raise UserError(
            f"image_size: {entry.name} does not accept images of {size}x{size} ({describe_error(error)}); "
            "set another --image_size"
        ) from None
    return {**count_parameters(entry.model), "bytes": model_bytes(entry.model), "macs": macs}


def _latencies(loaded: Sequence[_LoadedModel], config: BenchConfig, device: torch.device) -> list[list[dict[str, Any]]]:
    """Measure the latency of each model per batch size. Models are moved to the device in place."""
    memory_format = image_memory_format(config.channels_last, device)
    models = {str(index): entry.model.to(device).to(memory_format=memory_format) for index, entry in enumerate(loaded)}
    if config.compile:
        compile_for_latency(models.values(), batch_sizes=len(config.batch_sizes))
    latency: dict[str, list[dict[str, Any]]] = {key: [] for key in models}
    for batch_size in config.batch_sizes:
        images = {
            str(index): _images(batch_size, entry.image_size).to(device, memory_format=memory_format)
            for index, entry in enumerate(loaded)
        }
        measured = measure_latency(
            models,
            images,
            min_iterations=config.min_iterations,
            min_time_s=config.min_time_s,
            precision=config.precision,
            cuda_graph=config.cuda_graph,
        )
        for key, figures in measured.items():
            latency[key].append({"batch_size": batch_size, **figures})
    return list(latency.values())


def _images(batch_size: int, image_size: int) -> torch.Tensor:
    try:
        return torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError, OverflowError):
        size = f"{image_size}x{image_size}"
        raise UserError(
            f"batch_sizes: {batch_size} images of {size} do not fit in memory; lower batch_sizes or image_size"
        ) from None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {name!r} is not a valid device; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name} not found ({torch.cuda.device_count()} GPUs available); use auto or cpu")
    return device


def _environment(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    is_channels_last = image_memory_format(config.channels_last, device) == torch.channels_last
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": config.precision,
        "dtype": _DTYPES[config.precision],
        "memory_format": "channels_last" if is_channels_last else "contiguous",
        "compile": config.compile,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "tf32": _tf32(device),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "cuda": torch.version.cuda,
        },
    }


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
