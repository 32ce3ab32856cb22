"""`kd-accel plan`: what a live teacher and a cached one would cost here, from a short measurement, before anything runs."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kd_accel.cache.compatibility import stored_type
from kd_accel.cache.spec import LOGITS, TensorSpec
from kd_accel.commands.networks import build_network, wrap_student
from kd_accel.commands.schedule import build_schedule, total_steps
from kd_accel.commands.teacher import LayerPairs, live_teacher, load_teacher, pair_layers, ready_teacher
from kd_accel.config.schema import RunConfig, StorageType
from kd_accel.data.datamodule import Data, keep_images_on_gpu, load_data, training_loader
from kd_accel.distributed import Accelerator, leave_processes, start_processes
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.models.kernels import choose_kernels
from kd_accel.models.memory_format import weight_memory_format
from kd_accel.models.projectors import FeatureProjector
from kd_accel.models.student import StudentModule
from kd_accel.training.optim import build_optimizer
from kd_accel.training.trainer import train_step
from kd_accel.types import Batch

_STUDENTS = (1, 2, 5, 10)
_PROBE_BYTES = 32 * 2**20
_MEASURED_S = 2.0


@dataclass(frozen=True)
class Measured:
    """Seconds for one sample of the data on one process: its view, the teacher's answer, the student's step without it; bytes per
    second of the disk of the cache.
    """

    view_s: float
    teacher_s: float
    student_s: float
    write_bytes_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True)
class Job:
    """What is to be planned. samples: of training. sample_bytes: of one sample and view in the cache. processes: of the launch."""

    samples: int
    views: int
    epochs: int
    processes: int
    sample_bytes: int


def costs(measured: Measured, job: Job) -> dict[str, Any]:
    """Seconds of both ways, for several numbers of students, and where the cache has paid for itself.

    break_even_epoch: the first epoch, over all students together, after which building and reading was cheaper than live
    answers; None where reading a sample costs more than computing it.
    """
    per_epoch = job.samples / job.processes
    read_s = job.sample_bytes / measured.read_bytes_per_s
    build_s = job.views * per_epoch * (measured.view_s + measured.teacher_s + job.sample_bytes / measured.write_bytes_per_s)
    shared_s = measured.view_s + measured.student_s
    live_epoch_s, cached_epoch_s = per_epoch * (shared_s + measured.teacher_s), per_epoch * (shared_s + read_s)
    saved_s = live_epoch_s - cached_epoch_s
    students = [
        {
            "students": count,
            "live_s": count * job.epochs * live_epoch_s,
            "cached_s": build_s + count * job.epochs * cached_epoch_s,
        }
        for count in _STUDENTS
    ]
    return {
        "build_s": build_s,
        "live_epoch_s": live_epoch_s,
        "cached_epoch_s": cached_epoch_s,
        "break_even_epoch": math.floor(build_s / saved_s) + 1 if saved_s > 0 else None,
        "students": students,
    }


def run_plan(config: RunConfig, *, as_json: bool) -> None:
    """Print what both would cost, and which to take. Measures for some seconds; writes one temporary file."""
    if config.teacher is None:
        raise UserError("teacher: this config has none, so there is nothing to plan; give a config that distils")
    choose_kernels(deterministic=config.train.deterministic, tf32=config.train.tf32)
    accelerator = start_processes(config.train.precision, seed=config.seed, timeout_s=config.train.timeout_s)
    data = load_data(config.data)
    network, _ = build_network(config, data)
    teacher = load_teacher(config.teacher, data)
    pairs = pair_layers(config, network, teacher.model)
    directory = _existing(Path(config.teacher.cache_dir or config.directory))
    measured = _measure(config, data, network, teacher, pairs, accelerator, directory)
    dtype = config.teacher.dtype or "float16"
    kinds = sample_bytes(len(data.label_names), pairs, dtype)
    chosen = kind_of(config, pairs)
    views = config.data.views or config.train.epochs
    epochs = math.ceil(total_steps(config, _steps(config, data)) / _steps(config, data))
    job = Job(len(data.splits.train), views, epochs, accelerator.num_processes, kinds[chosen])
    result = {
        "measured": asdict(measured),
        "job": asdict(job),
        "kind": chosen,
        "dtype": dtype,
        "free_bytes": shutil.disk_usage(directory).free,
        "bytes_per_sample_and_view": kinds,
        "bytes": {name: size * job.samples * views for name, size in kinds.items()},
        **costs(measured, job),
    }
    result["recommendation"] = recommendation(result)
    accelerator.print(json.dumps(result) if as_json else _described(result, job, config))
    leave_processes(accelerator)


def recommendation(result: dict[str, Any]) -> str:
    """One sentence: live or cached, and why."""
    if result["bytes"][result["kind"]] > result["free_bytes"]:
        return (
            f"live: the cache would need {readable_size(result['bytes'][result['kind']])}, and "
            f"{readable_size(result['free_bytes'])} are free; fewer data.views or direction both would make it smaller"
        )
    if result["break_even_epoch"] is None:
        return "live: here reading a sample takes longer than letting the teacher answer"
    epochs, even = result["job"]["epochs"], result["break_even_epoch"]
    if even <= epochs:
        return f"cached: it has paid for itself after epoch {even} of the {epochs} of the first student"
    if even <= _STUDENTS[-1] * epochs:
        return (
            f"cached for {math.ceil(even / epochs)} students or more (it pays after {even} epochs, and one student takes "
            f"{epochs}); live for fewer. Fewer data.views make it pay sooner"
        )
    return f"live: the cache would pay only after {even} epochs; fewer data.views would change that"


def _measure(
    config: RunConfig,
    data: Data,
    network: nn.Module,
    teacher: Any,
    pairs: LayerPairs,
    accelerator: Accelerator,
    directory: Path,
) -> Measured:
    batches = _batches(config, data, accelerator)
    view_s = _seconds(lambda: next(batches), accelerator)
    batch = next(batches)
    model, normalize = ready_teacher(config, teacher, accelerator, layers=pairs.teacher)
    projectors = {
        layer: FeatureProjector(pairs.shapes[pairs.teacher[layer]][0], width).to(accelerator.device)
        for layer, width in pairs.projectors.pca_channels.items()
    }
    live = live_teacher(config, model, normalize, accelerator, layers=pairs.teacher, projectors=projectors)
    module = wrap_student(network, config, data, accelerator.device, projectors=pairs.projectors).to(accelerator.device).train()
    module.to(memory_format=weight_memory_format(config.train.channels_last, accelerator.device))
    module.start_recording()
    try:
        teacher_s = _seconds(lambda: live(batch), accelerator)
        student_s = _seconds(_step(config, module, batch, live, accelerator), accelerator)
    finally:
        module.stop_recording()
        live.close()
    samples = len(batch.samples)
    return Measured(view_s / samples, teacher_s / samples, student_s / samples, *_disk_rates(directory))


def _step(
    config: RunConfig, module: StudentModule, batch: Batch, live: Callable[[Batch], Any], accelerator: Accelerator
) -> Callable[[], None]:
    """The student's optimizer step with answers that are there already."""
    outputs = live(batch)
    optimizer = build_optimizer(module.parameters(), config.optim)
    loss, _ = build_schedule(config, steps_per_epoch=1).loss_at(0, 0)

    def step() -> None:
        with accelerator.autocast():
            terms, _, _ = train_step(module, lambda batch: outputs, loss, batch)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _batches(config: RunConfig, data: Data, accelerator: Accelerator) -> Iterator[Batch]:
    loader = training_loader(data, config, accelerator)
    if data.train.is_in_memory:  # decoding all others would take longer than the measurement
        keep_images_on_gpu(loader, data, config.data, accelerator.device)
    for epoch in itertools.count():
        for micro_batches in loader.epoch(epoch):
            for batch in micro_batches:
                yield batch.to(accelerator.device, non_blocking=True)


def _steps(config: RunConfig, data: Data) -> int:
    return max(1, len(data.splits.train) // config.train.batch_size)


def _seconds(work: Callable[[], object], accelerator: Accelerator) -> float:
    """Median of one call, after a first one that warms up."""
    times: list[float] = []
    work()
    _wait(accelerator)
    while sum(times) < _MEASURED_S and len(times) < 50 or len(times) < 3:
        started_at = time.perf_counter()
        work()
        _wait(accelerator)
        times.append(time.perf_counter() - started_at)
    return float(np.median(times))


def _wait(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def _disk_rates(directory: Path) -> tuple[float, float]:
    """(bytes per second written and flushed, read again from the page cache). Raises UserError where nothing can be written."""
    content = np.random.default_rng(0).bytes(_PROBE_BYTES)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            started_at = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            written_at = time.perf_counter()
            file.seek(0)
            read_at = time.perf_counter()
            file.read()
            ended_at = time.perf_counter()
    except OSError as error:
        raise UserError(f"teacher.cache_dir: cannot write to {directory} ({error.strerror}); name another") from None
    return _PROBE_BYTES / (written_at - started_at), _PROBE_BYTES / (ended_at - read_at)


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there: on the same disk."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.is_dir())


def sample_bytes(num_classes: int, pairs: LayerPairs, dtype: StorageType) -> dict[str, int]:
    """Bytes of one sample and view by what is kept: logits alone, with raw features, with projected ones."""
    logits = TensorSpec((num_classes,), stored_type(dtype, is_logits=True)).sample_bytes
    sizes = {LOGITS: logits}
    if not pairs.teacher:
        return sizes
    raw = {layer: TensorSpec(shape, dtype).sample_bytes for layer, shape in pairs.shapes.items()}
    sizes["logits and raw features"] = logits + sum(raw.values())
    widths = pairs.pca_channels()
    if widths:
        projected = (TensorSpec((width, *pairs.shapes[layer][1:]), dtype).sample_bytes for layer, width in widths.items())
        sizes["logits and projected features"] = logits + sum(projected)
    return sizes


def kind_of(config: RunConfig, pairs: LayerPairs) -> str:
    """Which of these a cache of this config keeps."""
    if (config.teacher is not None and config.teacher.outputs == "mixed") or not pairs.teacher:
        return LOGITS
    return "logits and projected features" if pairs.projectors.pca_channels else "logits and raw features"


def _described(result: dict[str, Any], job: Job, config: RunConfig) -> str:
    measured = result["measured"]
    lines = [
        f"measured here, a sample: teacher {1e6 * measured['teacher_s']:.0f} us, student's step "
        f"{1e6 * measured['student_s']:.0f} us, view {1e6 * measured['view_s']:.0f} us; disk: "
        f"{measured['write_bytes_per_s'] / 1e6:.0f} MB/s written, {measured['read_bytes_per_s'] / 1e6:.0f} MB/s read again",
        f"{job.views} views of {job.samples} samples, {job.epochs} epochs, {job.processes} processes; "
        f"{readable_size(result['free_bytes'])} free. In {result['dtype']} a cache takes",
    ]
    for name, size in result["bytes_per_sample_and_view"].items():
        marker = " <- this config" if name == result["kind"] else ""
        marker += " (more than is free)" if result["bytes"][name] > result["free_bytes"] else ""
        lines.append(
            f"  {name:30} {size:>8} bytes per sample and view, {readable_size(size * job.samples * job.views):>10}{marker}"
        )
    lines.append(
        f"an epoch: live {_time(result['live_epoch_s'])}, cached {_time(result['cached_epoch_s'])}; "
        f"build {_time(result['build_s'])}; break-even after epoch {result['break_even_epoch'] or 'never'}"
    )
    lines += [
        f"  {entry['students']:>2} students: live {_time(entry['live_s']):>9}, cached {_time(entry['cached_s']):>9}"
        for entry in result["students"]
    ]
    if config.data.views is None:
        lines.append("data.views is null (new views in each epoch): counted as one view for each epoch")
    return "\n".join([*lines, f"recommendation: {result['recommendation']}"])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
