"""Estimate of the cost of a live and of a cached teacher on a machine, from a few measured rates."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd_accel.cache.compatibility import storage_type
from kd_accel.cache.spec import LOGITS, TensorSpec
from kd_accel.config.schema import StorageType
from kd_accel.errors import UserError
from kd_accel.io.files import readable_size
from kd_accel.losses.targets import Identity, TargetFunction
from kd_accel.models.projectors import Shape

RAW, PROJECTED = "logits and raw features", "logits and projected features"
_STUDENTS = (1, 2, 5, 10)
_PROBE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Measured:
    """Measured rates of one process.

    Attributes:
        view_s: Seconds to create the view of one sample.
        teacher_s: Seconds of the teacher's forward, per sample.
        student_s: Seconds of the student's optimizer step without the teacher, per sample.
        write_bytes_per_s: Write throughput of the cache's disk, flush included.
        read_bytes_per_s: Read throughput from the page cache.
    """

    view_s: float
    teacher_s: float
    student_s: float
    write_bytes_per_s: float
    read_bytes_per_s: float


@dataclass(frozen=True)
class PlannedTraining:
    """Distillation whose cost is estimated.

    Attributes:
        samples: Number of training samples.
        views: Number of views of each sample.
        epochs: Number of epochs of one student.
        processes: Number of processes.
        sample_bytes: Size of one sample in one view in the cache.
        epoch_samples: Number of samples in an epoch; None = all. Unlabeled samples may take turns.
    """

    samples: int
    views: int
    epochs: int
    processes: int
    sample_bytes: int
    epoch_samples: int | None = None


def estimate(
    measured: Measured, training: PlannedTraining, *, kinds: Mapping[str, int], kind: str, dtype: StorageType, free_bytes: int
) -> dict[str, Any]:
    """Estimate the cost of a training, and recommend a live or a cached teacher.

    Args:
        measured: Measured rates.
        training: The training.
        kinds: Size of one sample in one view, in bytes, by the kind of contents, as `sample_bytes` returns it.
        kind: Kind of contents that the training stores.
        dtype: Storage type.
        free_bytes: Free space on the cache's disk.

    Returns:
        The arguments in plain values; `bytes_per_sample_and_view` and `bytes`, the sizes of a cache by the kind of contents;
        the entries of `costs`; and `recommendation`, one sentence.
    """
    result = {
        "measured": asdict(measured),
        "training": asdict(training),
        "kind": kind,
        "dtype": dtype,
        "free_bytes": free_bytes,
        "bytes_per_sample_and_view": dict(kinds),
        "bytes": {name: size * training.samples * training.views for name, size in kinds.items()},
        **costs(measured, training),
    }
    return {**result, "recommendation": recommend(result)}


def costs(measured: Measured, training: PlannedTraining) -> dict[str, Any]:
    """Compute the seconds of a live and of a cached teacher for several numbers of students.

    Returns:
        `build_s`; `live_epoch_s` and `cached_epoch_s`, the seconds of one epoch; `students`, a list of {students, live_s,
        cached_s}; and `break_even_epoch`, the first epoch, counted over all students, after which building and reading the
        cache has taken less time than live outputs. None if reading a sample takes longer than running the teacher.
    """
    per_view = training.samples / training.processes
    per_epoch = (training.epoch_samples or training.samples) / training.processes
    read_s = training.sample_bytes / measured.read_bytes_per_s
    write_s = training.sample_bytes / measured.write_bytes_per_s
    build_s = training.views * per_view * (measured.view_s + measured.teacher_s + write_s)
    shared_s = measured.view_s + measured.student_s
    live_epoch_s, cached_epoch_s = per_epoch * (shared_s + measured.teacher_s), per_epoch * (shared_s + read_s)
    saved_s = live_epoch_s - cached_epoch_s
    students = [
        {
            "students": count,
            "live_s": count * training.epochs * live_epoch_s,
            "cached_s": build_s + count * training.epochs * cached_epoch_s,
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


def recommend(result: Mapping[str, Any]) -> str:
    """Return a recommendation in one sentence: live or cached, and the reason."""
    needed, free_bytes = result["bytes"][result["kind"]], result["free_bytes"]
    if needed > free_bytes:
        return (
            f"live: the cache needs {readable_size(needed)}, but only {readable_size(free_bytes)} are free; fewer data.views, "
            "or direction both in distill.features.NAME.args, make it smaller"
        )
    if result["break_even_epoch"] is None:
        return "live: on this machine, reading a sample takes longer than running the teacher"
    epochs, even = result["training"]["epochs"], result["break_even_epoch"]
    if even <= epochs:
        return f"cached: the cache pays off after epoch {even} of {epochs} of the first student"
    if even <= _STUDENTS[-1] * epochs:
        return (
            f"cached for {math.ceil(even / epochs)} or more students, because the cache pays off after {even} epochs and one "
            f"student takes {epochs}; live for fewer students. With fewer data.views the cache pays off sooner"
        )
    return f"live: the cache pays off only after {even} epochs; with fewer data.views it pays off sooner"


def sample_bytes(
    num_classes: int, shapes: Mapping[str, Shape], targets: Mapping[str, TargetFunction], dtype: StorageType
) -> dict[str, int]:
    """Compute the size of one sample in one view by the kind of contents.

    Args:
        num_classes: Number of classes.
        shapes: Shape (D, H, W) of the teacher's maps by layer; empty without feature losses.
        targets: Target functions by layer.
        dtype: Storage type.

    Returns:
        Bytes of the logits alone, with raw features, and with the results of the target functions if one is not the identity.
    """
    logits = TensorSpec((num_classes,), storage_type(dtype, is_logits=True)).sample_bytes
    sizes = {LOGITS: logits}
    if shapes:
        sizes[RAW] = logits + sum(TensorSpec(shape, dtype).sample_bytes for shape in shapes.values())
    if stored_kind(targets) == PROJECTED:
        mapped = (TensorSpec(targets[layer].output_shape(shape), dtype).sample_bytes for layer, shape in shapes.items())
        sizes[PROJECTED] = logits + sum(mapped)
    return sizes


def stored_kind(targets: Mapping[str, TargetFunction]) -> str:
    """Return the kind of contents, a key of `sample_bytes`, of a cache with these target functions."""
    if not targets:
        return LOGITS
    return RAW if all(isinstance(target, Identity) for target in targets.values()) else PROJECTED


def disk_rates(directory: Path) -> tuple[float, float]:
    """Measure the throughput of a directory's disk with a temporary file.

    Returns:
        (bytes per second written and flushed, bytes per second read from the page cache).

    Raises:
        UserError: If the directory cannot be modified.
    """
    content = np.random.default_rng(0).bytes(_PROBE_BYTES)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            started_at = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            flushed_at = time.perf_counter()
            file.seek(0)
            read_at = time.perf_counter()
            file.read()
            ended_at = time.perf_counter()
    except OSError as error:
        raise UserError(
            f"teacher.cache.dir: cannot write to {directory} ({error.strerror}); set another teacher.cache.dir"
        ) from None
    return _PROBE_BYTES / (flushed_at - started_at), _PROBE_BYTES / (ended_at - read_at)


def estimate_text(result: Mapping[str, Any]) -> str:
    """Format the result of `estimate` for people."""
    measured, training, even = result["measured"], result["training"], result["break_even_epoch"]
    lines = [
        f"measured per sample: teacher {1e6 * measured['teacher_s']:.0f} us, student's step "
        f"{1e6 * measured['student_s']:.0f} us, view {1e6 * measured['view_s']:.0f} us; disk: "
        f"{measured['write_bytes_per_s'] / 1e6:.0f} MB/s write, {measured['read_bytes_per_s'] / 1e6:.0f} MB/s read",
        f"{_count(training['views'], 'view')} of {training['samples']} samples, {_count(training['epochs'], 'epoch')}, "
        f"{_count(training['processes'], 'process')}; {readable_size(result['free_bytes'])} free. Size of a cache in "
        f"{result['dtype']}:",
        *(_kind_line(result, name) for name in result["bytes_per_sample_and_view"]),
        f"one epoch: live {_time(result['live_epoch_s'])}, cached {_time(result['cached_epoch_s'])}; "
        f"build {_time(result['build_s'])}; {f'break-even after epoch {even}' if even else 'no break-even'}",
    ]
    lines += [
        f"  {_count(entry['students'], 'student'):>11}: live {_time(entry['live_s']):>9}, cached {_time(entry['cached_s']):>9}"
        for entry in result["students"]
    ]
    return "\n".join([*lines, f"recommendation: {result['recommendation']}"])


def _kind_line(result: Mapping[str, Any], name: str) -> str:
    size, total = result["bytes_per_sample_and_view"][name], result["bytes"][name]
    marker = " <- this config" if name == result["kind"] else ""
    marker += " (more than is free)" if total > result["free_bytes"] else ""
    return f"  {name:30} {size:>8} bytes per sample and view, {readable_size(total):>10}{marker}"


def _count(count: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
