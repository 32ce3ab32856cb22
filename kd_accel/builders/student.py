"""Builders of the student: its network, the losses, and the distiller that combines them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_accel.builders.labels import class_weights, mixing_settings
from kd_accel.config.schema import DataConfig, DistillConfig, FeatureLossConfig, RunConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.errors import UserError
from kd_accel.losses.base import FeatureLoss, LogitLoss
from kd_accel.losses.distiller import Distiller
from kd_accel.losses.ensemble import Ensemble
from kd_accel.losses.registry import Kind, build_loss
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_logits
from kd_accel.models.freezing import freeze_modules
from kd_accel.models.inference import image_memory_format, use_cpu_kernels
from kd_accel.models.pretrained import random_weights_notices, weights_info
from kd_accel.models.projectors import Shape
from kd_accel.models.weights import ModelCard, load_weights


@dataclass(frozen=True)
class Losses:
    """Losses of a distillation, before `FeatureLoss.build` creates their parameters.

    Attributes:
        logits: Loss on the logits; None = no such term.
        features: Feature losses by name.
        layers: Pairs of compared layers, {student layer: teacher layer}, of each feature loss.
        ensemble: Combination of the logits of several teachers; None for one teacher.
    """

    logits: LogitLoss | None = None
    features: Mapping[str, FeatureLoss] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ensemble: Ensemble | None = None

    def teacher_layers(self) -> list[str]:
        """Return the compared layers of the teacher, without duplicates."""
        return list(dict.fromkeys(layer for pairs in self.layers.values() for layer in pairs.values()))


def build_losses(config: RunConfig) -> Losses:
    """Build the losses of a config; empty without a teacher.

    Raises:
        UserError: If losses or their settings are unknown or not valid, or a loss does not support mixed labels. The message
            lists the mistakes of all losses.
    """
    if not config.has_teacher:
        return Losses()
    distill = config.distill or DistillConfig()
    sections: dict[str, tuple[Kind, str, Mapping[str, Any]]] = {}
    if distill.logits is not None:
        sections["logits"] = ("logits", distill.logits.loss, distill.logits.args)
    for name, feature in distill.features.items():
        sections[f"features.{name}"] = ("features", feature.loss or name, feature.args)
    built: dict[str, Any] = {}
    mistakes = []
    for section, (kind, loss, args) in sections.items():
        try:
            built[section] = build_loss(kind, loss, args, field=f"distill.{section}")
            _refuse_mixed_labels(config, section, loss, built[section])
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("; ".join(mistakes))
    features = {name: built[f"features.{name}"] for name in distill.features}
    layers = {name: _layer_pairs(feature) for name, feature in distill.features.items()}
    return Losses(built.get("logits"), features, layers, build_ensemble(config))


def build_ensemble(config: RunConfig) -> Ensemble | None:
    """Build the combination of the teachers' logits; None for a config without several teachers."""
    settings = (config.distill or DistillConfig()).ensemble
    return Ensemble(tuple(config.teachers), settings.mean, settings.confidence) if config.teachers else None


def _refuse_mixed_labels(config: RunConfig, section: str, name: str, loss: LogitLoss | FeatureLoss) -> None:
    """Raise UserError if a loss needs the class of each sample, and samples are mixed."""
    mixing = " and ".join(mixing_settings(config))
    if mixing and not loss.supports_mixed_labels:
        raise UserError(
            f"distill.{section}: {name} needs the one true class of each sample, which samples of {mixing} do not have; remove "
            f"{mixing}, or choose another loss (`kd-accel losses` shows those with mixed labels)"
        )


def _layer_pairs(feature: FeatureLossConfig) -> dict[str, str]:
    """Return {student layer: teacher layer}, or {student layer: "TEACHER/LAYER"} for one of several teachers."""
    layers = feature.layers
    assert layers != "auto", "replaced by builders/layers.py"
    pairs = dict(layers) if isinstance(layers, dict) else {layer: layer for layer in layers}
    return pairs if feature.teacher is None else {layer: f"{feature.teacher}/{own}" for layer, own in pairs.items()}


def build_student(config: RunConfig, data: DataModule) -> tuple[nn.Module, list[str]]:
    """Build the network to train, and load its initial weights.

    Returns:
        The network, with frozen modules, and notices: random weights, and the normalization that belongs to the weights.

    Raises:
        UserError: If the network or its weights do not fit the data, or modules to freeze are not found.
    """
    model, num_classes = config.model, len(data.label_names)
    network = build_model(model.arch, num_classes=num_classes, stem=model.stem, arch_args=model.arch_args, seed=config.seed)
    probe_logits(network, num_classes=num_classes, image_size=config.data.image_size)
    freeze_modules(network, model.freeze, field="model.freeze")
    if model.weights is None:
        return network, [*random_weights_notices(model.arch), *_notices_of_random_frozen_modules(model.freeze)]
    notices = load_weights(network, model.weights, arch=model.arch, is_exact=False)
    own_stem = weights_info(model.weights, model.arch).network.get("stem", model.stem)
    if own_stem != model.stem:
        notices.append(f"model.stem: {model.stem}, but {model.weights} was trained with {own_stem}, whose outputs differ")
    if data_settings(config) is not config.data:
        notices.append(
            f"model.weights: images are normalized with mean {_rounded(data.mean)} and std {_rounded(data.std)}, with which "
            f"{model.weights} was trained; data.mean and data.std override them"
        )
    return network, notices


def _notices_of_random_frozen_modules(names: Sequence[str]) -> list[str]:
    """Return a notice if modules without initial weights are frozen."""
    return [f"model.freeze: {', '.join(names)} keeps random weights, because model.weights is null"] if names else []


def data_settings(config: RunConfig) -> DataConfig:
    """Return the settings of the data, with mean and std of the initial weights if these are known and the config sets none."""
    data, weights = config.data, config.model.weights
    if weights is None or data.mean is not None:
        return data
    info = weights_info(weights, config.model.arch)
    return data if info.mean is None else data.model_copy(update={"mean": info.mean, "std": info.std})


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def build_distiller(
    config: RunConfig,
    data: DataModule,
    network: nn.Module,
    losses: Losses,
    target_shapes: Mapping[str, Shape],
    device: torch.device,
) -> Distiller:
    """Build the trained module, on the CPU.

    Args:
        config: Config of the run.
        data: Data of the run.
        network: Network of the student.
        losses: Losses of the distillation.
        target_shapes: Shape (D, H, W) of each target by teacher layer.
        device: Device of the training, which decides kernels and memory format.

    Raises:
        UserError: If `train.sync_batchnorm` is set and has no effect, or a layer of the student is not a feature map.
    """
    use_cpu_kernels(network, device, config.train.cpu_kernels)
    if config.train.sync_batchnorm:
        network = _with_sync_batchnorm(network)
    for loss in losses.features.values():
        loss.set_samples(torch.from_numpy(data.training_samples))
    return Distiller(
        network,
        mean=data.mean,
        std=data.std,
        logits=losses.logits,
        features=losses.features,
        layers=losses.layers,
        target_shapes=target_shapes,
        ensemble=losses.ensemble,
        image_size=config.data.image_size,
        label_smoothing=config.train.label_smoothing,
        has_unlabeled=data.has_unlabeled,
        class_weights=class_weights(config, data),
        freeze=config.model.freeze,
        seed=config.seed,
        memory_format=image_memory_format(config.train.channels_last, device),
    )


def _with_sync_batchnorm(network: nn.Module) -> nn.Module:
    """Replace BatchNorm layers by SyncBatchNorm, with the statistics of all processes. The state dict keeps its keys."""
    if not torch.cuda.is_available():
        raise UserError("train.sync_batchnorm: torch.nn.SyncBatchNorm requires a GPU, and no GPU was found; leave it out")
    if not any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise UserError(
            f"train.sync_batchnorm: has no effect, because {type(network).__name__} has no BatchNorm layer; leave it out"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def model_card(config: RunConfig, data: DataModule) -> ModelCard:
    """Return the model card: architecture, classes, normalization and image size, as deployment needs them."""
    return ModelCard(
        arch=config.model.arch,
        stem=config.model.stem,
        arch_args=dict(config.model.arch_args),
        label_names=list(data.label_names),
        mean=data.mean,
        std=data.std,
        image_size=config.data.image_size,
        background=config.data.background,
        pixel_range=config.data.pixel_range,
        crop_pct=config.data.crop_pct,
    )
