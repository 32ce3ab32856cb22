"""Rules of a config that need more than a type.

The rules are pure functions without torch, so that a mistake is reported in well under a second. Rules about the content of the
data or of a model, such as a column or a layer, are checked when these are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from kd_accel.config.data_schema import has_transform
from kd_accel.config.distill_rules import distill_problems, unknown_losses
from kd_accel.config.ensemble_rules import ensemble_problems, of_teacher
from kd_accel.config.fields import nearest
from kd_accel.config.loss_weights import labels_without_weight
from kd_accel.config.rules import WithoutEffect, arch_problems, at_least, no_effect, pixel_statistics
from kd_accel.config.schema import (
    MAX_IMAGE_SIZE,
    BenchConfig,
    DataConfig,
    OptimConfig,
    ReproduceConfig,
    RunConfig,
)
from kd_accel.config.seeds import MAX_SEEDS
from kd_accel.config.teacher_rules import teacher_problems
from kd_accel.config.training_rules import training_option_problems
from kd_accel.config.transform_schema import transform_config
from kd_accel.config.unlabeled_rules import label_column_problems, unlabeled_problems
from kd_accel.io.files import is_directory

SOURCES = ("hub:", "parquet:", "disk:", "imagefolder:", "csv:", "import:")
_MAX_WORKERS = 1024


def problems(config: BaseModel, losses: Mapping[str, Sequence[str]] | None = None) -> list[str]:
    """Check all rules of a config.

    Args:
        config: A RunConfig, BenchConfig or ReproduceConfig.
        losses: Names of the registered losses by kind, "logits" and "features"; None = names are not checked.

    Returns:
        A message for each broken rule: field, value, rule and remedy. Empty for a valid config.
    """
    if isinstance(config, ReproduceConfig):
        return [*_values(config), *_seeds(config), *(f"bench.{problem}" for problem in _bench(config.bench))]
    if isinstance(config, BenchConfig):
        return [*_values(config), *_bench(config)]
    assert isinstance(config, RunConfig)
    checks = (_values, _name, _data, _model, _teachers, distill_problems, _optim, _train, _checkpoint, training_option_problems)
    unknown = unknown_losses(config.distill, losses) if config.distill is not None and losses else ()
    return [*(problem for check in checks for problem in check(config)), *unknown]


def _values(config: BaseModel) -> Iterator[str]:
    """Yield a message for each value that is valid for no setting: infinite numbers, huge integers, control characters."""
    for name, value in _leaves("", config.model_dump()):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name}: {value} must be a finite number"
        elif isinstance(value, int) and not -(2**31) <= value < 2**32:
            yield f"{name}: {str(value)[:20]} is out of range; integers must be at least -2**31 and below 2**32"
        elif isinstance(value, str) and any(ord(letter) < 32 or 0xD7FF < ord(letter) < 0xE000 for letter in value):
            yield f"{name}: {ascii(value)[:60]} has control characters or lone surrogates; remove them"


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _leaves(f"{name}.{key}" if name else key, part)
            yield f"key of {name}", key
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(name, part)
    else:
        yield name, value


def _seeds(config: ReproduceConfig) -> Iterator[str]:
    if config.num_seeds is not None and not 1 <= config.num_seeds <= MAX_SEEDS:
        yield f"num_seeds: {config.num_seeds} must be from 1 to {MAX_SEEDS}, or null"


def _bench(bench: BenchConfig) -> Iterator[str]:
    for name in ("min_iterations", "num_classes", "image_size", "threads"):
        value = getattr(bench, name)
        if value is not None and value < 1:
            yield f"{name}: {value} must be at least 1"
    if (bench.image_size or 0) > MAX_IMAGE_SIZE:
        yield f"image_size: {bench.image_size} must be at most {MAX_IMAGE_SIZE}"
    if not bench.batch_sizes or min(bench.batch_sizes) < 1:
        yield f"batch_sizes: {bench.batch_sizes} must list at least one number, each at least 1"
    elif len(set(bench.batch_sizes)) < len(bench.batch_sizes):
        yield f"batch_sizes: {bench.batch_sizes} must list each number once; remove repeated numbers"
    if bench.time_limit_s is not None and not bench.time_limit_s > 0:
        yield f"time_limit_s: {bench.time_limit_s} must be above 0, or null"
    if bench.cuda_graph and bench.device == "cpu":
        yield "cuda_graph: has no effect with device cpu; leave it out"


def _name(config: RunConfig) -> Iterator[str]:
    if not 0 <= config.seed < 2**32:
        yield f"seed: {config.seed} must be at least 0 and below 2**32"
    if not config.run_dir and (not config.name or "/" in config.name or config.name.startswith(".")):
        yield f"name: {config.name!r} must be a single directory name; set run_dir for a path"
    if (config.run_dir or "").startswith("-"):
        yield f"run_dir: {config.run_dir!r} would be parsed as an option; write ./{config.run_dir}"
    if config.profile is not None and config.profile < 1:
        yield f"profile: {config.profile} must be at least 1"
    if config.role == "teacher" and config.has_teacher:
        yield WithoutEffect("role: teacher has no effect if a teacher is set (the role of the run is distilled); leave it out")


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.source != "digits" and not data.source.startswith(SOURCES):
        guess = f"; did you mean imagefolder:{data.source}?" if is_directory(data.source) else nearest(data.source, ["digits"])
        yield f"data.source: {data.source!r} must be digits or start with one of {', '.join(SOURCES)}{guess}"
    yield from at_least(data, "data", 1, "image_size", "views", "limit_train", "limit_test", "memory_limit_mib")
    yield from at_least(data, "data", 0, "num_workers", "view_seed")
    for name, most in (("image_size", MAX_IMAGE_SIZE), ("num_workers", _MAX_WORKERS)):
        if getattr(data, name) > most:
            yield f"data.{name}: {getattr(data, name)} must be at most {most}"
    if not 0 <= data.val_fraction < 1:
        yield f"data.val_fraction: {data.val_fraction} must be at least 0 and below 1"
    if data.test_fraction is not None and not 0 < data.test_fraction < 1:
        yield f"data.test_fraction: {data.test_fraction} must be above 0 and below 1"
    if data.val_split == data.train_split or (data.val_split == data.test_split and data.test_fraction is None):
        yield f"data.val_split: {data.val_split!r} must be another split than data.train_split and data.test_split"
    if data.test_split == data.train_split and data.test_fraction is None:
        yield (
            f"data.test_split: {data.test_split!r} is also data.train_split, so that the accuracy would be that of training "
            "samples; set another split, or data.test_fraction to hold out a part of it"
        )
    if not 0 < data.crop_pct <= 1:
        yield f"data.crop_pct: {data.crop_pct} must be above 0 and at most 1"
    yield from _pixel_range(data.pixel_range)
    yield from _transform(data)
    yield from _data_without_effect(data)
    yield from label_column_problems(config)
    yield from unlabeled_problems(config, sources=SOURCES)
    if (data.mean is None) != (data.std is None):
        yield "data.mean and data.std: one of them is set; set both or none"
    yield from pixel_statistics("data", data.mean, data.std)


def _pixel_range(pixel_range: list[float] | None) -> Iterator[str]:
    if pixel_range is None:
        return
    is_range = len(pixel_range) == 2 and all(map(math.isfinite, pixel_range))  # noqa: PLR2004
    if not is_range or pixel_range[0] >= pixel_range[1]:
        yield f"data.pixel_range: {pixel_range} must be [low, high] with low below high, such as [0, 4095]"


def _transform(data: DataConfig) -> Iterator[str]:
    transform = transform_config(data.transform)
    yield from (f"data.transform.{problem}" for problem in transform.problems())
    crop = transform.random_crop
    if crop is not None and crop.padding > data.image_size:
        yield f"data.transform.random_crop.padding: {crop.padding} must be at most data.image_size ({data.image_size})"


def _data_without_effect(data: DataConfig) -> Iterator[str]:
    splits = ("train_split", "val_split", "test_split")
    if data.source == "digits":
        names = ("label_column", *splits, *(() if data.unlabeled else ("on_error",)))
        yield from no_effect(data, "data", names, because="with source digits")
    if all(source.startswith(("digits", "imagefolder:")) for source in (data.source, data.unlabeled) if source):
        because = "with source digits" if data.source == "digits" else "with this source"
        yield from no_effect(data, "data", ("image_column",), because=because)
    if data.val_split not in (None, "auto"):
        yield from no_effect(data, "data", ("val_fraction",), because=f"with data.val_split {data.val_split}")
    if data.test_fraction is not None:
        yield from no_effect(data, "data", ("test_split",), because="with data.test_fraction")
    if not has_transform(data):
        yield from no_effect(data, "data", ("view_seed",), because="with transform none")
        if data.views not in (None, 1):
            yield WithoutEffect("data.views: has no effect (with transform none all views are equal); leave it out")


def _teachers(config: RunConfig) -> Iterator[str]:
    if not config.has_teacher and config.distill is not None:
        yield WithoutEffect("distill: has no effect without a teacher; add teacher.run, or remove distill")
    yield from ensemble_problems(config)
    for number, (name, own) in enumerate(config.by_teacher().items()):
        yield from (of_teacher(problem, name) for problem in teacher_problems(own, has_own_classes=number > 0))


def _model(config: RunConfig) -> Iterator[str]:
    yield from arch_problems("model.arch", config.model.arch)


def _optim(config: RunConfig) -> Iterator[str]:
    optim = config.optim
    if not (math.isfinite(optim.lr) and optim.lr > 0):
        yield f"optim.lr: {optim.lr} must be above 0"
    yield from at_least(optim, "optim", 0, "weight_decay", "momentum")
    if optim.momentum >= 1:
        yield f"optim.momentum: {optim.momentum} must be below 1"
    if optim.clip_norm is not None and not optim.clip_norm > 0:
        yield f"optim.clip_norm: {optim.clip_norm} must be above 0, or null"
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas: {optim.betas} must be two numbers in [0, 1)"
    unused = ("betas",) if optim.name == "sgd" else ("momentum", "nesterov")
    yield from no_effect(optim, "optim", unused, because=f"with optimizer {optim.name}")
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov: needs optim.momentum above 0"
    yield from _learning_rate_schedule(optim)


def _learning_rate_schedule(optim: OptimConfig) -> Iterator[str]:
    if optim.schedule != "step":
        yield from no_effect(optim, "optim", ("step_epochs", "step_gamma"), because=f"with {optim.schedule}")
    elif not optim.step_epochs:
        yield "optim.step_epochs: empty, but the step schedule needs the epochs after which the learning rate falls"
    if optim.warmup_fraction is not None and not 0 <= optim.warmup_fraction < 1:
        yield f"optim.warmup_fraction: {optim.warmup_fraction} must be at least 0 and below 1"


def _train(config: RunConfig) -> Iterator[str]:
    train = config.train
    yield from at_least(train, "train", 1, "epochs", "max_steps", "batch_size", "grad_accum_steps", "eval_batch_size")
    yield from at_least(train, "train", 1, "eval_every_epochs", "log_every_steps")
    yield from at_least(train, "train", 1, "timeout_s")
    if config.data.val_fraction == 0:
        yield from no_effect(train, "train", ("eval_every_epochs",), because="with data.val_fraction 0 nothing is evaluated")
    if config.optim.schedule == "step" and any(not 0 < epoch < train.epochs for epoch in config.optim.step_epochs):
        yield f"optim.step_epochs: {config.optim.step_epochs} must be above 0 and below train.epochs ({train.epochs})"
    if not 0 <= train.label_smoothing < 1:
        yield f"train.label_smoothing: {train.label_smoothing} must be at least 0 and below 1"
    elif train.label_smoothing and (cause := labels_without_weight(config)):
        yield WithoutEffect(
            f"train.label_smoothing: {train.label_smoothing} has no effect ({cause}: the labels have no weight at any step); "
            "leave it out, or give the labels a weight with distill.label_weight"
        )
    if train.ema_decay is not None and not 0 < train.ema_decay < 1:
        yield f"train.ema_decay: {train.ema_decay} must be above 0 and below 1, or null"
    if train.cuda_graph == "always" and train.compile:
        yield "train.cuda_graph: always cannot be combined with train.compile; set one of them"
    if train.grad_accum_steps >= 1 and train.batch_size % train.grad_accum_steps:
        yield (
            f"train.batch_size: {train.batch_size} must be a multiple of train.grad_accum_steps ({train.grad_accum_steps}), "
            "because it is the number of samples of one optimizer step, over all processes and accumulation steps"
        )


def _checkpoint(config: RunConfig) -> Iterator[str]:
    yield from at_least(config.checkpoint, "checkpoint", 1, "every_epochs", "every_steps", "keep", "stop_after_steps")
    yield from at_least(config.tracking, "tracking", 1, "timeout_s")
