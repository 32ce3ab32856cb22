"""The one module that is trained: the student and every loss with its parameters, under one DDP wrapper.

    loss = alpha * logit loss + label_weight * cross-entropy + sum over feature losses of weight * loss

With `label_weight` unset it is 1 - alpha. The teacher is not part of the module: it would be saved in each checkpoint, switched
by train() and broadcast by DDP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_accel.losses.base import FeatureLoss, LogitLoss
from kd_accel.losses.features import module_key
from kd_accel.losses.logits import cross_entropy, full_precision
from kd_accel.models.feature_extractor import FeatureExtractor, probe_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import Shape
from kd_accel.profiling import profiler_range
from kd_accel.types import TeacherOutput

Layers = Mapping[str, str]
"""{student layer: teacher layer}."""


@dataclass(frozen=True)
class LossWeights:
    """Temperature and weights of one step.

    Args:
        temperature: T of the logit loss.
        alpha: weight of the logit loss.
        label_weight: weight of the cross-entropy; None = 1 - alpha, or 1 without a logit loss.
        features: weight of each feature loss, by its name.
    """

    temperature: float = 4.0
    alpha: float = 0.5
    label_weight: float | None = None
    features: Mapping[str, float] = field(default_factory=dict)


class DistillerOutput(NamedTuple):
    """Result of one forward.

    Args:
        loss: the weighted sum, a scalar.
        terms: each summand before its weight, scalars by term name: `ce`, the logit loss's name, `features/NAME`.
        logits: of the student, [B, C].
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Distiller(nn.Module):
    """A student with the losses by which it learns; without a logit or feature loss it is plain training.

    Args:
        student: plain network, normalized images [B, 3, H, W] -> logits [B, C].
        mean: per-channel mean in 0..1 for the student.
        std: per-channel standard deviation in 0..1 for the student.
        logits: loss on the logits, None for none.
        features: feature losses by name.
        layers: {student layer: teacher layer} that are compared: for all feature losses, or by the name of each.
        target_shapes: (D, H, W) of each target by the teacher's layer, as `TeacherCache.shapes` or the target functions give
            them.
        image_size: side of the images in pixels, with which the student's layers are measured.
        label_smoothing: of the cross-entropy.
        seed: of the initial weights of learned projectors.
        memory_format: of the images and all maps; by default the one of the images.

    Raises:
        UserError: a layer is not found or not a feature map.
        ValueError: `layers` or `target_shapes` does not fit the feature losses.

    Call `start_recording` before the first forward with feature losses, `stop_recording` at the end.
    """

    def __init__(  # noqa: PLR0913  (the parts of a distillation)
        self,
        student: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        logits: LogitLoss | None = None,
        features: Mapping[str, FeatureLoss] | None = None,
        layers: Layers | Mapping[str, Layers] | None = None,
        target_shapes: Mapping[str, Shape] | None = None,
        image_size: int = 32,
        label_smoothing: float = 0.0,
        seed: int = 0,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        super().__init__()
        self.student = student
        self.normalize = Normalize(mean, std, memory_format=memory_format)
        self.logit_loss = logits
        self._label_smoothing = label_smoothing
        self._layers = _layers_by_loss(features or {}, layers or {})
        recorded = list(dict.fromkeys(layer for pairs in self._layers.values() for layer in pairs))
        shapes = probe_layers(student, recorded, image_size=image_size)
        self.feature_losses = nn.ModuleDict()
        for name, loss in (features or {}).items():
            own = {layer: shapes[layer] for layer in self._layers[name]}
            loss.build(own, _shapes_of_targets(self._layers[name], target_shapes or {}), seed=seed)
            self.feature_losses[module_key(name)] = loss
        self._extractor = FeatureExtractor(student, recorded)

    @property
    def term_names(self) -> list[str]:
        """Names of the summands, in the order of `DistillerOutput.terms`."""
        logits = [self.logit_loss.name or "logits"] if self.logit_loss is not None else []
        return ["ce", *logits, *(f"features/{name}" for name in self._layers)]

    @property
    def uses_index(self) -> bool:
        """Whether a loss needs the samples' positions."""
        losses = [*self.feature_losses.values(), *([self.logit_loss] if self.logit_loss is not None else [])]
        return any(loss.uses_index for loss in losses)

    def start_recording(self) -> None:
        """Register the hooks on the compared layers; `stop_recording` must follow."""
        self._extractor.open()

    def stop_recording(self) -> None:
        """Remove the hooks."""
        self._extractor.close()

    def forward(
        self,
        images: Tensor,
        target: TeacherOutput,
        labels: Tensor,
        weights: LossWeights | None = None,
        *,
        index: Tensor | None = None,
    ) -> DistillerOutput:
        """Compute the loss of a micro-batch.

        Args:
            images: uint8 [B, 3, H, W], the pixels of the view.
            target: output of the teacher for the same view; empty for plain training.
            labels: int64 [B].
            weights: temperature and weights of this step.
            index: int64 [B], the samples' positions in their split, on the device; needed where `uses_index`.
        """
        weights = weights or LossWeights()
        with profiler_range("student"):
            logits = full_precision(self.student(self.normalize(images)))  # cast once, for all losses and their gradients
        recorded = self._extractor.take()
        with profiler_range("loss"):
            return self._combine(logits, recorded, target, labels, weights, index)

    def _combine(
        self,
        logits: Tensor,
        recorded: Mapping[str, Tensor],
        target: TeacherOutput,
        labels: Tensor,
        weights: LossWeights,
        index: Tensor | None,
    ) -> DistillerOutput:
        terms = {"ce": cross_entropy(logits, labels, label_smoothing=self._label_smoothing)}
        loss = terms["ce"]
        label_weight = weights.label_weight
        if self.logit_loss is not None:
            assert target.logits is not None, "a logit loss needs the teacher's logits"
            distance = self.logit_loss(logits, target.logits, temperature=weights.temperature, labels=labels, index=index)
            terms[self.term_names[1]] = distance
            label_weight = 1 - weights.alpha if label_weight is None else label_weight
            loss = weights.alpha * distance + label_weight * loss
        elif label_weight is not None:
            loss = label_weight * loss
        if self._layers and not recorded:
            raise RuntimeError("no features are recorded: call start_recording() before the first forward")
        for name, pairs in self._layers.items():
            features = {layer: recorded[layer] for layer in pairs}
            targets = {layer: target.features[theirs] for layer, theirs in pairs.items()}
            distance = self.feature_losses[module_key(name)](features, targets, index=index)
            terms[f"features/{name}"] = distance
            loss = loss + weights.features.get(name, 1.0) * distance
        return DistillerOutput(loss, terms, logits)


def _layers_by_loss(features: Mapping[str, FeatureLoss], layers: Layers | Mapping[str, Layers]) -> dict[str, dict[str, str]]:
    """Return {feature loss: {student layer: teacher layer}}. Raises ValueError if one has no layers, or layers no loss."""
    nested = {name: pairs for name, pairs in layers.items() if not isinstance(pairs, str)}
    if unknown := nested.keys() - features.keys():
        raise ValueError(f"layers: {', '.join(sorted(unknown))} is not one of the feature losses ({', '.join(features)})")
    shared = {layer: theirs for layer, theirs in layers.items() if isinstance(theirs, str)}
    found = {name: dict(nested.get(name, shared)) for name in features}
    if empty := [name for name, pairs in found.items() if not pairs]:
        raise ValueError(f"layers: none are given for the feature losses {', '.join(empty)}")
    return found


def _shapes_of_targets(pairs: Layers, target_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the target's shape by the student's layer. Raises ValueError for a layer of the teacher without a shape."""
    if missing := [theirs for theirs in pairs.values() if theirs not in target_shapes]:
        raise ValueError(
            f"target_shapes: missing for the teacher's layers {', '.join(missing)} (given: {', '.join(target_shapes)})"
        )
    return {layer: target_shapes[theirs] for layer, theirs in pairs.items()}
