"""From model settings to networks, and the module that is trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import Data
from kd_accel.errors import UserError
from kd_accel.models.cpu_kernels import use_cpu_kernels
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_logits
from kd_accel.models.memory_format import image_memory_format
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import Projectors
from kd_accel.models.student import StudentModule
from kd_accel.models.weights import ModelCard, load_weights


def build_network(config: RunConfig, data: Data) -> tuple[nn.Module, list[str]]:
    """(the network to train, notices about weights that were replaced). Raises UserError for one that does not fit the data."""
    model = config.model
    network = build_model(
        model.arch, num_classes=len(data.label_names), stem=model.stem, arch_args=model.arch_args, seed=config.seed
    )
    probe_logits(network, num_classes=len(data.label_names), image_size=config.data.image_size)
    notices = []
    if model.weights is not None:
        notices = load_weights(network, model.weights, arch=model.arch, is_exact=False)
    return network, notices


def wrap_student(
    network: nn.Module, config: RunConfig, data: Data, device: torch.device, *, projectors: Projectors | None
) -> StudentModule:
    """The one module that is trained, its layers not yet open. device: where it will be."""
    feature = config.distill.feature if config.distill else None
    use_cpu_kernels(network, device)
    if config.train.sync_batchnorm:
        network = _with_sync_batchnorm(network)
    return StudentModule(
        network,
        Normalize(data.mean, data.std, memory_format=image_memory_format(config.train.channels_last, device)),
        layers=feature.layers if feature and projectors else (),
        student_projectors=projectors.student if projectors else None,
    )


def _with_sync_batchnorm(network: nn.Module) -> nn.Module:
    """Same names and numbers in its state; the statistics of a step are those of all processes."""
    if not torch.cuda.is_available():
        raise UserError("train.sync_batchnorm: torch has it on GPUs only, and there is none here; leave it out")
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise UserError(f"train.sync_batchnorm: has no effect, {type(network).__name__} has no BatchNorm layer; leave it out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def card_of(config: RunConfig, data: Data) -> ModelCard:
    """What must be known to deploy the trained network."""
    return ModelCard(
        arch=config.model.arch,
        stem=config.model.stem,
        arch_args=dict(config.model.arch_args),
        label_names=list(data.label_names),
        mean=data.mean,
        std=data.std,
        image_size=config.data.image_size,
    )
