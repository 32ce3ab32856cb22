"""Settings that decide the contents of a cache, to build it once for several trainings."""

from __future__ import annotations

import json
from collections.abc import Iterable

from kd_accel.config.schema import RunConfig

_OF_THE_KERNELS = {"precision", "compile", "channels_last", "tf32", "cpu_kernels", "cuda_graph"}
_OF_A_TRAINING = {"name", "run_dir", "role", "seed", "distill", "optim", "train", "checkpoint", "tracking", "profile"}


def configs_to_build(configs: Iterable[RunConfig]) -> list[RunConfig]:
    """Return the configs for which a cache must be built or completed, so that all trainings can read theirs.

    Args:
        configs: Configs of trainings.

    Returns:
        Those of the configs whose teacher can complete a cache, without repetitions: a config is left out if another one
        differs from it only in settings of the training, and compares the same layers or more.
    """
    found: list[tuple[RunConfig, str, frozenset[str]]] = []
    for config in sorted(filter(_has_cache_to_build, configs), key=lambda each: -len(_features(each))):
        outputs, features = _outputs(config), _features(config)
        if not any(outputs == other and features <= others for _, other, others in found):
            found.append((config, outputs, features))
    return [config for config, _, _ in found]


def _has_cache_to_build(config: RunConfig) -> bool:
    teachers = [own.teacher for own in config.by_teacher().values() if own.teacher is not None]
    return any(teacher.uses_cache and not teacher.is_stored for teacher in teachers)


def _outputs(config: RunConfig) -> str:
    """Return the settings of data, teachers, student and kernels. The student's channels are those of a fitted target."""
    kernels = config.train.model_dump(mode="json", include=_OF_THE_KERNELS)
    return json.dumps([config.model_dump(mode="json", exclude=_OF_A_TRAINING), kernels])


def _features(config: RunConfig) -> frozenset[str]:
    features = config.distill.features if config.distill else {}
    return frozenset(json.dumps([name, each.model_dump(mode="json", exclude={"weight"})]) for name, each in features.items())
