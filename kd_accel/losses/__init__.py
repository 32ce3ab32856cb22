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
    "reverse_kl_loss": "logits",
    "js_loss": "logits",
    "logit_mse_loss": "logits",
    "standardized": "logits",
    "DKD": "dkd",
    "dkd_loss": "dkd",
    "DIST": "dist",
    "dist_loss": "dist",
    "NKD": "nkd",
    "nkd_loss": "nkd",
    "AT": "attention",
    "at_loss": "attention",
    "CRD": "crd",
    "Cosine": "cosine",
    "cosine_loss": "cosine",
    "MGD": "mgd",
    "PKT": "pkt",
    "pkt_loss": "pkt",
    "Review": "review",
    "hcl_loss": "review",
    "RKD": "rkd",
    "rkd_loss": "rkd",
    "SP": "sp",
    "sp_loss": "sp",
    "Ensemble": "ensemble",
    "combine_logits": "ensemble",
    "confidences": "ensemble",
    "Distiller": "distiller",
    "DistillerOutput": "distiller",
    "LossWeights": "distiller",
}

__all__ = [*_SUBMODULES]

if TYPE_CHECKING:
    from kd_accel.losses.attention import AT as AT
    from kd_accel.losses.attention import at_loss as at_loss
    from kd_accel.losses.base import FeatureLoss as FeatureLoss
    from kd_accel.losses.base import LogitLoss as LogitLoss
    from kd_accel.losses.base import LossSettings as LossSettings
    from kd_accel.losses.base import register as register
    from kd_accel.losses.cosine import Cosine as Cosine
    from kd_accel.losses.cosine import cosine_loss as cosine_loss
    from kd_accel.losses.crd import CRD as CRD
    from kd_accel.losses.dist import DIST as DIST
    from kd_accel.losses.dist import dist_loss as dist_loss
    from kd_accel.losses.distiller import Distiller as Distiller
    from kd_accel.losses.distiller import DistillerOutput as DistillerOutput
    from kd_accel.losses.distiller import LossWeights as LossWeights
    from kd_accel.losses.dkd import DKD as DKD
    from kd_accel.losses.dkd import dkd_loss as dkd_loss
    from kd_accel.losses.ensemble import Ensemble as Ensemble
    from kd_accel.losses.ensemble import combine_logits as combine_logits
    from kd_accel.losses.ensemble import confidences as confidences
    from kd_accel.losses.features import MSE as MSE
    from kd_accel.losses.features import mse_loss as mse_loss
    from kd_accel.losses.logits import KL as KL
    from kd_accel.losses.logits import cross_entropy as cross_entropy
    from kd_accel.losses.logits import js_loss as js_loss
    from kd_accel.losses.logits import kl_loss as kl_loss
    from kd_accel.losses.logits import logit_mse_loss as logit_mse_loss
    from kd_accel.losses.logits import reverse_kl_loss as reverse_kl_loss
    from kd_accel.losses.logits import standardized as standardized
    from kd_accel.losses.mgd import MGD as MGD
    from kd_accel.losses.nkd import NKD as NKD
    from kd_accel.losses.nkd import nkd_loss as nkd_loss
    from kd_accel.losses.pkt import PKT as PKT
    from kd_accel.losses.pkt import pkt_loss as pkt_loss
    from kd_accel.losses.review import Review as Review
    from kd_accel.losses.review import hcl_loss as hcl_loss
    from kd_accel.losses.rkd import RKD as RKD
    from kd_accel.losses.rkd import rkd_loss as rkd_loss
    from kd_accel.losses.sp import SP as SP
    from kd_accel.losses.sp import sp_loss as sp_loss


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _SUBMODULES:
        return getattr(importlib.import_module(f"{__name__}.{_SUBMODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
