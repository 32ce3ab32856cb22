"""Measuring models by name: the runs of this program from the very files that a user would deploy, or bare architectures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from kd_accel.bench.latency import measure_latency
from kd_accel.bench.params import count_macs, count_parameters, model_bytes
from kd_accel.config import BenchConfig
from kd_accel.models.files import load_run_model
from kd_accel.models.zoo import build_model
from kd_accel.types import UserError

_DEFAULT_IMAGE_SIZE = 32


@dataclass(frozen=True)
class _Named:
    name: str
    arch: str
    model: nn.Module
    image_size: int


def bench_models(names: Sequence[str], config: BenchConfig) -> dict[str, Any]:
    """Figures of each model, ready for JSON. Raises UserError for an unknown name or a device that is not there."""
    device = _device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.precision == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 needs a GPU; use bf16 or no")
    loaded = [_load(name, config) for name in names]
    counts = [_counts(entry) for entry in loaded]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    models = {str(index): entry.model.to(device).to(memory_format=layout) for index, entry in enumerate(loaded)}
    if config.compile:
        for model in models.values():
            model.compile()
    latency: dict[str, list[dict[str, Any]]] = {key: [] for key in models}
    for batch_size in config.batch_sizes:
        images = {
            str(index): _images(batch_size, entry.image_size).to(device, memory_format=layout)
            for index, entry in enumerate(loaded)
        }
        measured = measure_latency(
            models, images, min_iterations=config.min_iterations, min_time_s=config.min_time_s, precision=config.precision
        )
        for key, figures in measured.items():
            latency[key].append({"batch_size": batch_size, **figures})
    entries = [
        {"name": entry.name, "arch": entry.arch, "image_size": entry.image_size, **counted, "latency": latency[str(index)]}
        for index, (entry, counted) in enumerate(zip(loaded, counts, strict=True))
    ]
    return {**_circumstances(config, device), "models": entries}


def _load(name: str, config: BenchConfig) -> _Named:
    path = Path(name)
    if path.is_dir():
        model, card = load_run_model(path, field=name)
        return _Named(name, card.arch, model, config.image_size or card.image_size)
    if "/" in name and not name.startswith(("torchvision/", "timm/", "import:")):
        raise UserError(f"bench: there is no run directory {name!r}; an arch is torchvision/NAME, timm/NAME or import:...")
    model = build_model(name, num_classes=config.num_classes, field="bench").eval()
    return _Named(name, name, model, config.image_size or _DEFAULT_IMAGE_SIZE)


def _counts(entry: _Named) -> dict[str, int]:
    """On the CPU, before anything is compiled."""
    images = _images(1, entry.image_size)
    return {**count_parameters(entry.model), "bytes": model_bytes(entry.model), "macs": count_macs(entry.model, images)}


def _images(batch_size: int, image_size: int) -> torch.Tensor:
    return torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name} is not there ({torch.cuda.device_count()} GPUs found); use auto or cpu")
    return device


def _circumstances(config: BenchConfig, device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": config.precision,
        "layout": "channels_last" if config.channels_last else "contiguous",
        "compile": config.compile,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__},
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all. Raises UserError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None
