"""kd_accel: knowledge distillation for image classifiers.

Public names are imported on first use, so that `import kd_accel` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ATTRIBUTES = {
    "Distiller": "kd_accel.losses.distiller",
    "EpochBatchSampler": "kd_accel.data.views",
    "ImageDataset": "kd_accel.data.views",
    "LossWeights": "kd_accel.losses.distiller",
    "Model": "kd_accel.models.predictor",
    "Prediction": "kd_accel.models.predictor",
    "Preempted": "kd_accel.errors",
    "RunConfig": "kd_accel.config.schema",
    "RunResult": "kd_accel.api",
    "Teacher": "kd_accel.teacher.teacher",
    "TeacherCache": "kd_accel.cache.teacher_cache",
    "TeacherOutput": "kd_accel.types",
    "UserError": "kd_accel.errors",
    "ViewDataset": "kd_accel.data.views",
    "evaluate": "kd_accel.api",
    "load_model": "kd_accel.models.predictor",
    "train": "kd_accel.api",
    "use_cpu_kernels": "kd_accel.models.inference",
}
_SUBMODULES = {
    "losses": "kd_accel.losses",
    "targets": "kd_accel.losses.targets",
    "transforms": "kd_accel.data.transforms",
}

__all__ = [*_ATTRIBUTES, *_SUBMODULES, "__version__"]

if TYPE_CHECKING:
    from kd_accel import losses as losses
    from kd_accel.api import RunResult as RunResult
    from kd_accel.api import evaluate as evaluate
    from kd_accel.api import train as train
    from kd_accel.cache.teacher_cache import TeacherCache as TeacherCache
    from kd_accel.config.schema import RunConfig as RunConfig
    from kd_accel.data import transforms as transforms
    from kd_accel.data.views import EpochBatchSampler as EpochBatchSampler
    from kd_accel.data.views import ImageDataset as ImageDataset
    from kd_accel.data.views import ViewDataset as ViewDataset
    from kd_accel.errors import Preempted as Preempted
    from kd_accel.errors import UserError as UserError
    from kd_accel.losses import targets as targets
    from kd_accel.losses.distiller import Distiller as Distiller
    from kd_accel.losses.distiller import LossWeights as LossWeights
    from kd_accel.models.inference import use_cpu_kernels as use_cpu_kernels
    from kd_accel.models.predictor import Model as Model
    from kd_accel.models.predictor import Prediction as Prediction
    from kd_accel.models.predictor import load_model as load_model
    from kd_accel.teacher.teacher import Teacher as Teacher
    from kd_accel.types import TeacherOutput as TeacherOutput


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _ATTRIBUTES:
        return getattr(importlib.import_module(_ATTRIBUTES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(_SUBMODULES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
