"""Benchmark of models by name: runs, loaded from their files for deployment, and architectures with random weights.

In: names and a `BenchConfig`. Out: a dict for a JSON file, with the settings, the environment (device, dtype, threads, kernels,
versions), and for each model its parameters, bytes, multiply-adds and latency per batch size. Kernels and memory format are
those of training, but modules are not replaced by kd_accel's faster ones: they are measured as a user deploys them. A report
identifies a run by its path and the digest of its files.

All models are measured at one batch size, in turns, before the next batch size. A benchmark that is stopped, by its time limit
or by SIGINT, has the figures that were measured until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_accel.bench.environment import environment
from kd_accel.bench.latency import LatencyMeasurement, compile_for_latency
from kd_accel.bench.model_stats import count_macs, count_parameters, model_bytes
from kd_accel.bench.onnx import OnnxColumn, check_onnx_setting
from kd_accel.bench.provenance import TIME_LIMIT, model_digest
from kd_accel.bench.timing import TimeLimit, TimeLimitSpent
from kd_accel.config.schema import BenchConfig
from kd_accel.errors import UserError, describe_error
from kd_accel.io.files import is_directory
from kd_accel.models.factory import build_model
from kd_accel.models.inference import choose_kernels, image_memory_format
from kd_accel.models.weights import load_run_model

Entry = dict[str, Any]
"""Figures of one model, as in the JSON file."""
_DEFAULT_IMAGE_SIZE = 32
_COMPARED_IMAGES = 20
"""Number of random images on which a network in ONNX Runtime is compared with its module."""
_ARCH_PREFIXES = ("torchvision/", "timm/", "import:")


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


class Benchmark:
    """Measurement of models by name, with the figures that it has so far.

    Args:
        names: Run directories, or architectures: torchvision/NAME, timm/NAME, import:package.module:function.
        config: Settings of the benchmark.
        on_model: Function that is called with the entry of each model as soon as its parameters and MACs are counted.
        on_latency: Function that is called with the entry of a model and its figures at one batch size once they are measured.

    Attributes:
        entries: Figures of the models whose parameters and MACs are counted.
        stopped_by: Reason of an early end: "time_limit_s", "SIGINT" or "error"; None for a complete measurement.

    Raises:
        UserError: If a setting is not valid on this machine.
    """

    def __init__(
        self,
        names: Sequence[str],
        config: BenchConfig,
        *,
        on_model: Callable[[Entry], None] = lambda entry: None,
        on_latency: Callable[[Entry, dict[str, Any]], None] = lambda entry, latency: None,
    ) -> None:
        self._names, self._config, self._on_model, self._on_latency = names, config, on_model, on_latency
        self._device = _device(config)
        check_onnx_setting(config, self._device)
        self._onnx = OnnxColumn()
        self.entries: list[Entry] = []
        self.stopped_by: str | None = None

    def run(self) -> None:
        """Measure all models, until the time limit is reached.

        Raises:
            UserError: If a model cannot be loaded or does not accept the images. Nothing is timed before.
        """
        try:
            self._count_and_time()
        except TimeLimitSpent:
            self.stopped_by = TIME_LIMIT
        except BaseException as error:
            self.stopped_by = "SIGINT" if isinstance(error, KeyboardInterrupt) else "error"
            raise

    def figures(self) -> dict[str, Any]:
        """Return the figures that were measured so far: settings, environment, models, and what is missing, as JSON values."""
        return {
            "settings": self._config.model_dump(mode="json"),
            "complete": self.stopped_by is None,
            "stopped_by": self.stopped_by,
            "not_measured": self._not_measured(),
            **environment(self._config, self._device),
            "models": self.entries,
        }

    @property
    def has_latency(self) -> bool:
        """Existence of a measured latency."""
        return any(entry["latency"] for entry in self.entries)

    def _not_measured(self) -> list[dict[str, Any]]:
        """Return the batch sizes without a latency, by model."""
        latencies = [entry["latency"] for entry in self.entries]
        latencies += [[]] * (len(self._names) - len(latencies))
        measured = [{latency["batch_size"] for latency in each} for each in latencies]
        missing = [[size for size in self._config.batch_sizes if size not in sizes] for sizes in measured]
        names = map(_plain_name, self._names)
        return [{"name": name, "batch_sizes": sizes} for name, sizes in zip(names, missing, strict=True) if sizes]

    def _count_and_time(self) -> None:
        config = self._config
        choose_kernels(deterministic=False, tf32=config.tf32)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        loaded = [_load(name, config) for name in self._names]
        for each in loaded:
            self.entries.append({**_identity(each), **_counts(each), "latency": []})
            self._on_model(self.entries[-1])
        for index, each in enumerate(loaded if config.onnx else ()):
            self._onnx.add(str(index), each.model, _images(_COMPARED_IMAGES, each.image_size), arch=each.arch)
        self._time(loaded, TimeLimit(config.time_limit_s))

    def _time(self, loaded: Sequence[_LoadedModel], limit: TimeLimit) -> None:
        """Measure the latency of each model per batch size. Models are moved to the device in place."""
        config, device = self._config, self._device
        memory_format = image_memory_format(config.channels_last, device)
        models = {str(index): each.model.to(device).to(memory_format=memory_format) for index, each in enumerate(loaded)}
        if config.compile:
            compile_for_latency(models.values(), batch_sizes=len(config.batch_sizes))
        for batch_size in config.batch_sizes:
            limit.check()
            images = {
                str(index): _images(batch_size, each.image_size).to(device, memory_format=memory_format)
                for index, each in enumerate(loaded)
            }
            measurement = LatencyMeasurement(
                {**models, **self._onnx.models},
                {**images, **self._onnx.images(images)},
                min_iterations=config.min_iterations,
                min_time_s=config.min_time_s,
                precision=config.precision,
                cuda_graph=config.cuda_graph,
                limit=limit,
            )
            try:
                measurement.run()
            finally:
                self._add(batch_size, measurement)

    def _add(self, batch_size: int, measurement: LatencyMeasurement) -> None:
        """Add the figures of one batch size, of which an interrupted measurement has those of its complete rounds, or none."""
        measured = measurement.figures()
        for index, entry in enumerate(self.entries if measured else ()):
            figures = {**measured[str(index)], **self._onnx.figures(str(index), measured)}
            latency = {"batch_size": batch_size, **figures, "complete": measurement.is_complete}
            entry["latency"].append(latency)
            self._on_latency(entry, latency)


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
    benchmark = Benchmark(names, config)
    benchmark.run()
    return benchmark.figures()


def _load(name: str, config: BenchConfig) -> _LoadedModel:
    if is_directory(name):
        path = Path(name)
        model, card = load_run_model(path, field=name)
        return _LoadedModel(str(path), card.arch, model, config.image_size or card.image_size, model_digest(path))
    if not name.startswith(_ARCH_PREFIXES):
        raise UserError(
            f"bench: run directory {name!r} not found; give a run directory, or an architecture as torchvision/NAME, timm/NAME "
            "or import:package.module:function"
        )
    model = build_model(name, num_classes=config.num_classes, field="bench").eval()
    return _LoadedModel(name, name, model, config.image_size or _DEFAULT_IMAGE_SIZE)


def _plain_name(name: str) -> str:
    """Return the name of a model as in its entry: of a run its path, without a slash at the end."""
    return str(Path(name)) if is_directory(name) else name


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


def _images(batch_size: int, image_size: int) -> torch.Tensor:
    try:
        return torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError, OverflowError):
        size = f"{image_size}x{image_size}"
        raise UserError(
            f"batch_sizes: {batch_size} images of {size} do not fit in memory; lower batch_sizes or image_size"
        ) from None


def _device(config: BenchConfig) -> torch.device:
    device = _named_device(config.device)
    if config.precision == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 needs a GPU; use bf16 or float32")
    if config.cuda_graph and device.type == "cpu":
        raise UserError("cuda_graph: true needs a GPU; leave it out")
    return device


def _named_device(name: str) -> torch.device:
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
