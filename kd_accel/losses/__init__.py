"""Distillation losses: functions of tensors, modules with settings, and the distiller that combines them.

Public names such as `kd_accel.losses.KL` are imported on first use, so that the registry can be imported without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_SUBMODULES = {
    "FeatureLoss": "base",
    "LogitLoss": "base",
    "LossSettings": "base",
    "register": "base",
    "KL": "logits",
    "cross_entropy": "logits",
    "kl_loss": "logits",
    "MSE": "features",
    "mse_loss": "features",
    "Distiller": "distiller",
    "DistillerOutput": "distiller",
    "LossWeights": "distiller",
}

__all__ = [*_SUBMODULES]

if TYPE_CHECKING:
    from kd_accel.losses.base import FeatureLoss as FeatureLoss
    from kd_accel.losses.base import LogitLoss as LogitLoss
    from kd_accel.losses.base import LossSettings as LossSettings
    from kd_accel.losses.base import register as register
    from kd_accel.losses.distiller import Distiller as Distiller
    from kd_accel.losses.distiller import DistillerOutput as DistillerOutput
    from kd_accel.losses.distiller import LossWeights as LossWeights
    from kd_accel.losses.features import MSE as MSE
    from kd_accel.losses.features import mse_loss as mse_loss
    from kd_accel.losses.logits import KL as KL
    from kd_accel.losses.logits import cross_entropy as cross_entropy
    from kd_accel.losses.logits import kl_loss as kl_loss


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _SUBMODULES:
        return getattr(importlib.import_module(f"{__name__}.{_SUBMODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
