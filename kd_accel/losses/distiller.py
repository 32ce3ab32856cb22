"""The trained module: the student and all losses with their parameters, under one DDP wrapper.

    loss = alpha * logit loss + label_weight * cross-entropy + sum over feature losses of weight * feature loss

`label_weight` is 1 - alpha by default. The teacher is not a submodule, because it would then be saved in each checkpoint,
switched to training mode by `train()`, and broadcast by DDP.

Shapes: B batch, C classes, D channels, H height, W width.

References:
    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (logit loss and cross-entropy).
    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015 (feature losses).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from kd_accel.errors import UserError
from kd_accel.losses.base import FeatureLoss, LogitLoss
from kd_accel.losses.ensemble import Ensemble
from kd_accel.losses.features import module_key
from kd_accel.losses.logits import CrossEntropy, full_precision
from kd_accel.models.feature_extractor import FeatureExtractor, probe_layers
from kd_accel.models.freezing import freeze_modules, frozen_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import Shape
from kd_accel.profiling import profiler_range
from kd_accel.types import TeacherOutput

Layers = Mapping[str, str]
"""Pairs of compared layers, {student layer: teacher layer}."""


@dataclass(frozen=True)
class LossWeights:
    """Temperature and weights of the loss in one step: numbers, or scalar tensors on the device of the losses.

    Attributes:
        temperature: Temperature T of the logit loss, above 0.
        alpha: Weight of the logit loss.
        label_weight: Weight of the cross-entropy; None = 1 - alpha, or 1 without a logit loss.
        features: Weight of each feature loss by name; 1 for a name that is missing.
        teachers: Weight of each of several teachers by name; 1 for a name that is missing.
    """

    temperature: float | Tensor = 4.0
    alpha: float | Tensor = 0.5
    label_weight: float | Tensor | None = None
    features: Mapping[str, float | Tensor] = field(default_factory=dict)
    teachers: Mapping[str, float | Tensor] = field(default_factory=dict)


class DistillerOutput(NamedTuple):
    """Output of `Distiller.forward`.

    Attributes:
        loss: Weighted sum of the terms, a scalar.
        terms: Terms before weighting, scalars by name: `ce`, the name of the logit loss, and `features/NAME`.
        logits: Logits of the student, [B, C], in float32 or float64.
        teacher_logits: Logits of the teacher, [B, C], of several teachers combined; None without logits of a teacher.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    logits: Tensor
    teacher_logits: Tensor | None = None


class Distiller(nn.Module):
    """Student and distillation losses in one module; without a logit or feature loss, its loss is the cross-entropy.

    With feature losses, call `start_recording` before the first forward, and `stop_recording` after the last one.

    Args:
        student: Network that maps normalized images, float32 [B, 3, H, W], to logits [B, C].
        mean: Mean per channel for the student's input normalization, as fractions of 1.
        std: Standard deviation per channel for the student's input normalization, as fractions of 1.
        logits: Loss on the logits; None = no such term.
        features: Feature losses by name. The names are also those of their weights and of the terms `features/NAME`.
        layers: Pairs of compared layers, {student layer: teacher layer}: one mapping for all feature losses, or one per name.
        target_shapes: Shape (D, H, W) of each target by teacher layer, as in `TeacherCache.shapes`.
        ensemble: Combination of the logits of several teachers; None for one teacher.
        image_size: Height and width of the images in pixels, for a forward that determines the shapes of the student's layers.
        label_smoothing: Label smoothing of the cross-entropy, from 0 to 1.
        has_unlabeled: Whether labels may be -1 (no label); such samples count as 0 in the cross-entropy.
        class_weights: Factor of the cross-entropy for each class, C numbers; None = 1.
        freeze: Names of modules of the student that are not trained and stay in evaluation mode.
        seed: Seed of the initial weights of learned projectors.
        memory_format: Memory format of images and feature maps; `torch.preserve_format` = that of the images.

    Raises:
        UserError: If a layer of the student is not found, or outputs no feature map, if all layers of a feature loss
            depend on frozen modules alone, or if nothing would be trained.
        ValueError: If `layers` or `target_shapes` does not match the feature losses, or a feature loss is used already.
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
        ensemble: Ensemble | None = None,
        image_size: int = 32,
        label_smoothing: float = 0.0,
        has_unlabeled: bool = False,
        class_weights: Sequence[float] | None = None,
        freeze: Sequence[str] = (),
        seed: int = 0,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        super().__init__()
        self.student = student
        self.normalize = Normalize(mean, std, memory_format=memory_format)
        self.logit_loss, self._ensemble = logits, ensemble
        self._cross_entropy = CrossEntropy(
            label_smoothing=label_smoothing, has_unlabeled=has_unlabeled, class_weights=class_weights
        )
        self._layers = _layers_by_loss(features or {}, layers or {})
        recorded = list(dict.fromkeys(layer for pairs in self._layers.values() for layer in pairs))
        shapes = probe_layers(student, recorded, image_size=image_size) if recorded else {}
        self.feature_losses = nn.ModuleDict()
        for name, loss in (features or {}).items():
            if loss.is_built:
                raise ValueError(f"features: the loss {name} is that of another distiller; create one for each")
            loss.is_built = True
            student_shapes = {layer: shapes[layer] for layer in self._layers[name]}
            loss.build(student_shapes, _target_shapes(self._layers[name], target_shapes or {}), seed=seed)
            self.feature_losses[module_key(name)] = loss
        self._extractor = FeatureExtractor(student, recorded)
        self._frozen = freeze_modules(student, freeze)
        if freeze:
            self._refuse_frozen_features(frozen_layers(student, recorded, image_size=image_size), freeze)

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; frozen modules of the student stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def term_names(self) -> list[str]:
        """Names of the terms, in the order of `DistillerOutput.terms`."""
        logits = [self.logit_loss.name or "logits"] if self.logit_loss is not None else []
        return ["ce", *logits, *(f"features/{name}" for name in self._layers)]

    @property
    def uses_index(self) -> bool:
        """True if a loss needs the positions of the samples."""
        return any(loss.uses_index for loss in self._losses())

    def start_recording(self) -> None:
        """Register forward hooks on the compared layers, until `stop_recording` removes them."""
        self._extractor.open()

    def stop_recording(self) -> None:
        """Remove the forward hooks."""
        self._extractor.close()

    def student_logits(self, images: Tensor) -> Tensor:
        """Run the student alone on uint8 images [B, 3, H, W] for an evaluation, and drop the recorded features.

        Features that are kept occupy memory, and a compiled student would be compiled again for the next batch.

        Returns:
            Logits [B, C].
        """
        logits: Tensor = self.student(self.normalize(images))
        self._extractor.take()
        return logits

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
            images: Pixels of the view, uint8 or float [B, 3, H, W], in 0..255.
            target: Output of the teacher for the same view; `TeacherOutput()` without a logit or feature loss.
            labels: Class indices, int64 [B], or mixed labels, float [B, C]. The cross-entropy of a sample without a label (-1,
                or a row of zeros) counts as 0.
            weights: Temperature and weights of this step; None = the defaults of `LossWeights`.
            index: Positions of the samples in their source split, int64 [B], on the device; required if `uses_index`.

        Returns:
            The loss, its terms, and the student's logits [B, C].

        Raises:
            ValueError: If `target` lacks logits or features of a loss, `weights` has the name of no feature loss, or a loss
                does not support mixed labels.
            RuntimeError: If there are feature losses and `start_recording` was not called.
        """
        weights = weights or LossWeights()
        self._refuse_mismatch(target, weights)
        if labels.is_floating_point():
            self._refuse_mixed_labels()
        with profiler_range("student"):
            # Cast once: otherwise each loss would cast the logits, and each backward their gradient.
            logits = full_precision(self.student(self.normalize(images)))
        recorded = self._extractor.take()
        with profiler_range("loss"):
            return self._combine(logits, recorded, target, labels, weights, index)

    def _refuse_mismatch(self, target: TeacherOutput, weights: LossWeights) -> None:
        """Raise ValueError if the teacher's output or the weights do not match the losses."""
        if self.logit_loss is not None and self._ensemble is None and target.logits is None:
            raise ValueError("target: lacks logits, which the logit loss compares; pass TeacherOutput(logits=...)")
        teacher_layers = [layer for pairs in self._layers.values() for layer in pairs.values()]
        if missing := [layer for layer in teacher_layers if layer not in target.features]:
            raise ValueError(
                f"target: lacks features of the teacher's layers {', '.join(missing)}; pass TeacherOutput(features={{...}}) of "
                "all compared layers"
            )
        if unknown := [name for name in weights.features if name not in self._layers]:
            raise ValueError(
                f"weights.features: {', '.join(unknown)} not found among the feature losses "
                f"({', '.join(self._layers) or 'none'}); use their names as keys"
            )
        teachers = self._ensemble.names if self._ensemble is not None else ()
        if unknown := [name for name in weights.teachers if name not in teachers]:
            raise ValueError(
                f"weights.teachers: {', '.join(unknown)} not found among the names of the teachers "
                f"({', '.join(teachers) or 'none'}); use those as keys"
            )

    def _refuse_frozen_features(self, layers: Sequence[str], freeze: Sequence[str]) -> None:
        """Raise UserError for a feature loss on layers of which no weight is trained, nor one before them."""
        for name, pairs in self._layers.items():
            if not pairs.keys() - set(layers):
                raise UserError(
                    f"features.{name}: its layers ({', '.join(pairs)}) depend on frozen modules alone ({', '.join(freeze)}), "
                    "so that it has no effect on the student; compare deeper layers, or freeze fewer modules"
                )

    def _refuse_mixed_labels(self) -> None:
        """Raise ValueError if a loss does not support mixed labels."""
        names = zip(self.term_names[1:], self._losses(), strict=True)
        if unsupported := [name for name, loss in names if not loss.supports_mixed_labels]:
            raise ValueError(
                f"labels: {', '.join(unsupported)} needs the class of each sample, int64 [B], and not mixed labels (float "
                "[B, C]); use a transform without mixup and cutmix, or another loss"
            )

    def _losses(self) -> list[nn.Module]:
        """Return the losses in the order of `term_names`, without the cross-entropy."""
        return [*([self.logit_loss] if self.logit_loss is not None else []), *self.feature_losses.values()]

    def _combine(
        self,
        logits: Tensor,
        recorded: Mapping[str, Tensor],
        target: TeacherOutput,
        labels: Tensor,
        weights: LossWeights,
        index: Tensor | None,
    ) -> DistillerOutput:
        terms = {"ce": self._cross_entropy(logits, labels)}
        loss = terms["ce"]
        label_weight, teacher_logits = weights.label_weight, target.logits
        if self._ensemble is not None:
            teacher_logits = self._ensemble(target.members, weights.teachers, temperature=weights.temperature, labels=labels)
        if self.logit_loss is not None:
            assert teacher_logits is not None, "checked by _refuse_mismatch"
            distance = self.logit_loss(logits, teacher_logits, temperature=weights.temperature, labels=labels, index=index)
            terms[self.term_names[1]] = distance
            label_weight = 1 - weights.alpha if label_weight is None else label_weight
            loss = weights.alpha * distance + label_weight * loss
        elif label_weight is not None:
            loss = label_weight * loss
        if self._layers and not recorded:
            raise RuntimeError("no features were recorded; call start_recording() before the first forward")
        for name, pairs in self._layers.items():
            features = {layer: recorded[layer] for layer in pairs}
            targets = {layer: target.features[teacher_layer] for layer, teacher_layer in pairs.items()}
            distance = self.feature_losses[module_key(name)](features, targets, index=index)
            terms[f"features/{name}"] = distance
            loss = loss + weights.features.get(name, 1.0) * distance
        return DistillerOutput(loss, terms, logits, teacher_logits)


def _layers_by_loss(features: Mapping[str, FeatureLoss], layers: Layers | Mapping[str, Layers]) -> dict[str, dict[str, str]]:
    """Return the layer pairs of each feature loss. Raises ValueError for a loss without layers, or layers without a loss."""
    nested = {name: pairs for name, pairs in layers.items() if not isinstance(pairs, str)}
    if unknown := nested.keys() - features.keys():
        raise ValueError(
            f"layers: {', '.join(sorted(unknown))} not found among the feature losses ({', '.join(features) or 'none'}); use "
            "their names as keys"
        )
    shared = {student_layer: teacher_layer for student_layer, teacher_layer in layers.items() if isinstance(teacher_layer, str)}
    by_loss = {name: dict(nested.get(name, shared)) for name in features}
    if empty := [name for name, pairs in by_loss.items() if not pairs]:
        raise ValueError(
            f"layers: missing for the feature losses {', '.join(empty)}; pass {{student layer: teacher layer}} for each"
        )
    return by_loss


def _target_shapes(pairs: Layers, target_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shape of each target by student layer. Raises ValueError if the shape of a teacher layer is missing."""
    if missing := [layer for layer in pairs.values() if layer not in target_shapes]:
        raise ValueError(
            f"target_shapes: missing for the teacher's layers {', '.join(missing)} (given: "
            f"{', '.join(target_shapes) or 'none'}); pass (D, H, W) of each target, as in TeacherCache.shapes"
        )
    return {student_layer: target_shapes[teacher_layer] for student_layer, teacher_layer in pairs.items()}
