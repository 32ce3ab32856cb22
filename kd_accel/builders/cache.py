"""Directory of a config's cache, and the request of a training or a build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kd_accel.builders.student import Losses
from kd_accel.cache.compatibility import CacheRequest, covered_samples, create_request, data_fields
from kd_accel.cache.differences import TargetSettings
from kd_accel.cache.stored_teacher import StoredTeacher
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.errors import UserError
from kd_accel.losses.targets import TargetFunction
from kd_accel.teacher.teacher import Teacher


def configs_with_cache(config: RunConfig) -> dict[str, RunConfig]:
    """Return the config of each teacher that uses a cache, by the teacher's name; the name of a single teacher is empty.

    Raises:
        UserError: If none of them uses a cache.
    """
    found = {name: own for name, own in config.by_teacher().items() if own.teacher is not None and own.teacher.uses_cache}
    if not found:
        section = "teachers.NAME" if config.teachers else "teacher"
        raise UserError(
            f"{section}.outputs: this config uses no cache; set {section}.outputs to cached or mixed, and {section}.cache.dir "
            "to the directory of the cache"
        )
    return found


def cache_directory(config: RunConfig) -> Path:
    """Return the directory of the cache of a single teacher, which uses one."""
    assert config.teacher is not None and config.teacher.cache.dir is not None, "checked by config/validation.py"
    return Path(config.teacher.cache.dir)


def cache_request(
    config: RunConfig,
    data: DataModule,
    teacher: Teacher,
    losses: Losses,
    targets: Mapping[str, TargetFunction],
    device: torch.device,
    *,
    views: int | None = None,
) -> CacheRequest:
    """Create the request of a config.

    Args:
        config: Config of the run.
        data: Data of the run.
        teacher: Teacher of the run.
        losses: Losses of the run.
        targets: Target functions of the compared layers; not requested with `outputs: mixed`, which computes features live.
        device: Device of the teacher.
        views: Number of views of the training split; None = the views that the training uses.

    Raises:
        UserError: If a layer has the name under which the logits are stored.
    """
    assert config.teacher is not None, "checked by config/validation.py"
    train = config.train
    return create_request(
        teacher,
        data,
        targets if config.teacher.outputs == "cached" else {},
        device=device,
        views=used_views(config, data) if views is None else views,
        dtype=config.teacher.cache.dtype,
        precision=train.precision,
        channels_last=train.channels_last,
        compiled=train.compile,
        tf32=train.tf32,
        cpu_kernels=train.cpu_kernels,
        target_settings=target_settings(losses),
    )


def stored_request(
    config: RunConfig, data: DataModule, teacher: StoredTeacher, losses: Losses, targets: Mapping[str, TargetFunction]
) -> CacheRequest:
    """Create the request of a training without a teacher: what only the teacher could decide is taken from the cache.

    Args:
        config: Config of the run.
        data: Data of the run.
        teacher: The teacher as the cache describes it.
        losses: Losses of the run.
        targets: Target functions of the compared layers.
    """
    assert config.teacher is not None, "checked by config/validation.py"
    return CacheRequest(
        {"teacher": teacher.fingerprint_fields(), "numerics": teacher.numerics(), **data_fields(data)},
        covered_samples(data),
        used_views(config, data),
        targets,
        config.teacher.cache.dtype,
        target_settings=target_settings(losses),
    )


def target_settings(losses: Losses) -> dict[str, TargetSettings]:
    """Return the names of the settings that decide each target, by the teacher's layer."""
    settings: dict[str, TargetSettings] = {}
    for name, pairs in losses.layers.items():
        section = f"distill.features.{name}"
        args = tuple(f"{section}.args.{arg}" for arg in type(losses.features[name]).Settings.model_fields)
        for layer in pairs.values():
            settings.setdefault(layer, TargetSettings(f"{section}.layers", args))
    return settings


def used_views(config: RunConfig, data: DataModule) -> int:
    """Return the number of views that a training uses, from view 0 on."""
    assert data.num_views is not None, "checked by config/validation.py"
    return min(data.num_views, config.train.epochs)
