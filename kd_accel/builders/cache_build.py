"""Build and verification of a config's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from kd_accel.builders.cache import cache_directory, cache_request, stored_request, used_views
from kd_accel.builders.header import build_header, header_text
from kd_accel.builders.labels import ClassNames
from kd_accel.builders.layers import with_layers
from kd_accel.builders.student import build_losses, build_student
from kd_accel.builders.teacher import (
    build_targets,
    live_teacher,
    load_teacher,
    refuse_stored_teacher,
    teacher_on_device,
)
from kd_accel.cache.build_spec import CacheBuild
from kd_accel.cache.compatibility import CacheRequest, check_contents, check_fingerprint, check_samples
from kd_accel.cache.manifest import find_spec, read_samples, read_spec
from kd_accel.cache.reader import OpenCache
from kd_accel.cache.spec import CacheSpec
from kd_accel.cache.stored_teacher import StoredTeacher
from kd_accel.cache.verify import find_damaged_files, refuse_other_outputs
from kd_accel.cache.writer import OpenProgress, build_cache, locked_for_building
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import DataModule, load_data
from kd_accel.data.hashing import hashed_order
from kd_accel.distributed import Accelerator, launch_notices, on_main_process, patient_group
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.accuracy import check_accuracy
from kd_accel.teacher.loading import teacher_notices
from kd_accel.teacher.teacher import LiveTeacher, Teacher
from kd_accel.training.progress import SampleProgress

_PURPOSE = 43
_CHECKED_SAMPLES = 256
"""Test samples on which the teacher is checked before a build: a few seconds on any machine that can build the cache."""


@dataclass(frozen=True)
class VerifiedCache:
    """Result of a verification.

    Attributes:
        directory: Directory of the cache.
        cache_spec: Its spec.
        wrong: {name of a missing or damaged file: what is wrong with the file}.
        largest_difference: Largest relative difference of the recomputed samples; None if files are missing or damaged, or if
            the config has no teacher.
    """

    directory: Path
    cache_spec: CacheSpec
    wrong: dict[str, str]
    largest_difference: float | None


@dataclass(frozen=True)
class _Parts:
    directory: Path
    data: DataModule
    teacher: Teacher
    request: CacheRequest


def build_cache_of(config: RunConfig, accelerator: Accelerator, *, class_names: ClassNames) -> None:
    """Write what the cache of a config lacks. Every process must call this function.

    Args:
        config: Config with one teacher.
        accelerator: Accelerator of the launch.
        class_names: Class names of data without labels, as `unlabeled_class_names` returns them; None if the data has labels.

    Raises:
        UserError: If the parts of the config do not fit together, or the directory holds another cache.
    """
    config = with_layers(config)
    assert config.teacher is not None
    directory, settings = cache_directory(config), config.teacher.cache
    refuse_stored_teacher(config.teacher)
    with locked_for_building(directory, accelerator):
        parts = _load_parts(config, accelerator, class_names)
        classes, image_size = parts.data.label_names, config.data.image_size
        notices = [*launch_notices(accelerator), *parts.data.notices]
        notices += teacher_notices(parts.teacher, classes, image_size=image_size)
        for line in [header_text(build_header(config, parts.data, parts.teacher, accelerator)), *notices]:
            accelerator.print(line)
        network, normalize = _network(config, parts, accelerator)
        build = CacheBuild(
            directory,
            parts.request,
            parts.data,
            network,
            normalize,
            accelerator,
            batch_samples=settings.batch_size or config.train.batch_size // config.train.grad_accum_steps,
            shard_mib=settings.shard_mib,
            is_compiled=config.train.compile,
            is_graphed=config.train.cuda_graph != "never",
        )
        if config.teacher.min_accuracy is not None and find_spec(directory) is None:
            _check_accuracy(build, config.teacher.min_accuracy)
        build_cache(build, progress=_progress(directory, accelerator))


def _check_accuracy(build: CacheBuild, minimum: float | Literal["auto"]) -> None:
    """Check the teacher on a few test samples, before a new cache is paid for. Raises UserError as `check_accuracy`."""
    test, labels = build.data.splits.test, build.data.test.labels
    drawn = hashed_order((_PURPOSE,), test[labels[test] >= 0])[:_CHECKED_SAMPLES]
    shares = [(drawn[start : start + build.batch_samples], 0) for start in range(0, len(drawn), build.batch_samples)]

    def check() -> list[str]:
        live = LiveTeacher(build.network, build.normalize, autocast=build.accelerator.autocast)
        correct = 0
        for batch in build.data.batches("test", shares):
            logits = live(batch.to(build.accelerator.device)).logits
            assert logits is not None
            correct += int((logits.argmax(1).cpu() == batch.labels).sum())
        live.close()
        return check_accuracy(correct / max(1, len(drawn)), labels[drawn], minimum)

    for notice in on_main_process(build.accelerator, check):
        build.accelerator.print(notice)


def verify_cache_of(config: RunConfig, accelerator: Accelerator, *, class_names: ClassNames) -> VerifiedCache:
    """Check every byte of the cache of a config, and recompute a few samples if the config has a teacher.

    Every process must call this function, with the arguments of `build_cache_of`.

    Raises:
        UserError: If the cache does not match the config, lacks what the config requests, or differs from the live teacher.
    """
    config = with_layers(config)
    assert config.teacher is not None
    directory = cache_directory(config)
    parts = None if config.teacher.is_stored else _load_parts(config, accelerator, class_names, rereads=True)
    if parts is None:
        request = _request_without_teacher(config, accelerator, class_names)
    else:
        request = replace(parts.request, views=used_views(config, parts.data))
    cache_spec = read_spec(directory)
    check_fingerprint(directory, cache_spec, request)
    check_contents(directory, cache_spec, request)
    wrong = find_damaged_files(directory, cache_spec, accelerator=accelerator, group=patient_group(accelerator))
    difference = None if wrong or parts is None else _recompute(config, parts, cache_spec, accelerator)
    return VerifiedCache(directory, cache_spec, wrong, difference)


def _load_parts(config: RunConfig, accelerator: Accelerator, class_names: ClassNames, *, rereads: bool = False) -> _Parts:
    losses = build_losses(config)
    data = load_data(config.data, accelerator, class_names=class_names, rereads=rereads)
    student, _ = build_student(config, data)
    teacher = load_teacher(config, data)
    targets = build_targets(config, losses, student, teacher)
    request = cache_request(config, data, teacher, losses, targets, accelerator.device, views=data.num_views)
    return _Parts(cache_directory(config), data, teacher, request)


def _request_without_teacher(config: RunConfig, accelerator: Accelerator, class_names: ClassNames) -> CacheRequest:
    losses = build_losses(config)
    data = load_data(config.data, accelerator, class_names=class_names, rereads=True)
    student, _ = build_student(config, data)
    teacher = StoredTeacher.read(cache_directory(config))
    return stored_request(config, data, teacher, losses, build_targets(config, losses, student, teacher))


def _network(config: RunConfig, parts: _Parts, accelerator: Accelerator) -> tuple[nn.Module, Normalize]:
    return teacher_on_device(config, parts.teacher, accelerator, list(parts.request.targets))


def _recompute(config: RunConfig, parts: _Parts, cache_spec: CacheSpec, accelerator: Accelerator) -> float:
    samples, targets = read_samples(parts.directory, cache_spec), parts.request.targets
    for split, requested in parts.request.samples.items():
        check_samples(parts.directory, split, samples[split], requested)
    cache = OpenCache(parts.directory, cache_spec, samples, tuple(targets))
    cache.load_targets(targets)
    for target in targets.values():
        target.to(accelerator.device)
    live = live_teacher(config, *_network(config, parts, accelerator), targets, accelerator, for_few=True)
    try:
        return refuse_other_outputs(
            cache,
            live,
            parts.data,
            epochs=config.train.epochs,
            precision=config.train.precision,
            rank=accelerator.process_index,
            device=accelerator.device,
        )
    finally:
        live.close()


def _progress(directory: Path, accelerator: Accelerator) -> OpenProgress:
    @contextmanager
    def opened(total_samples: int) -> Iterator[Callable[[int], None]]:
        progress = SampleProgress(str(directory), total_samples=total_samples, is_main=accelerator.is_main_process)
        try:
            yield progress.advance
        finally:
            progress.close()

    return opened
