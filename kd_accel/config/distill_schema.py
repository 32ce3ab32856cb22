"""Settings of the distillation objective: schedules, the logit loss and the feature losses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kd_accel.config.section import Argument, Section


class Schedule(Section):
    """A number that changes during training: a pure function of the epochs (or steps) done.

    Args:
        start: Value at the beginning.
        kind: Shape: exponential = max(floor, start * decay ** t); linear and cosine go from start to end; constant = start.
        floor: Lowest value (exponential).
        decay: Factor per unit (exponential).
        end: Value from `length` on (linear, cosine).
        length: Number of units from start to end (linear, cosine); null = the entire training.
        unit: Unit of t: epochs completed, or optimizer steps done.
    """

    start: float
    kind: Literal["exponential", "linear", "cosine", "constant"] = "exponential"
    floor: float | None = None
    decay: float | None = None
    end: float | None = None
    length: int | None = None
    unit: Literal["epoch", "step"] = "epoch"


class LogitLossConfig(Section):
    """The loss between the logits of student and teacher.

    Args:
        loss: Name of a registered loss, or import:package.module:Class.
        args: Settings of the loss itself.
    """

    loss: str = "kl"
    args: dict[str, Argument] = Field(default_factory=dict)


class FeatureLossConfig(Section):
    """A loss between features of student and teacher, summed over the layers. Its NAME is its term in the metrics.

    Args:
        loss: Name of a registered loss, or import:package.module:Class; null = NAME.
        weight: Factor of the sum.
        teacher: NAME of the teacher whose layers are compared, with several teachers (teachers.NAME).
        layers: Names of modules that both networks have, or {student's module: teacher's module}; auto = the last block of each
            resolution, paired from the deepest one. config.yaml of the run has the pairs.
        args: Settings of the loss itself.
    """

    loss: str | None = None
    weight: float | Schedule = 0.1
    teacher: str | None = None
    layers: Literal["auto"] | list[str] | dict[str, str] = Field(
        default_factory=lambda: ["layer1", "layer2", "layer3", "layer4"]
    )
    args: dict[str, Argument] = Field(default_factory=dict)


class EnsembleConfig(Section):
    """The combination of the logits of several teachers.

    Args:
        mean: Averaged quantity: probabilities softened by the temperature, or logits.
        confidence: Also weight the teachers in each sample: less, the larger the cross-entropy of a teacher's logits.
    """

    mean: Literal["probabilities", "logits"] = "probabilities"
    confidence: bool = False


class DistillConfig(Section):
    """The distillation objective: alpha * logit loss + label_weight * cross-entropy + the weighted feature losses.

    Args:
        temperature: T, by which the logits of student and teacher are divided in the logit loss.
        alpha: Weight of the logit loss.
        label_weight: Weight of the cross-entropy with the labels; null = 1 - alpha.
        logits: The logit loss; null = none.
        features: Feature losses by name.
        ensemble: The combination of the logits of several teachers.
    """

    temperature: float | Schedule = 4.0
    alpha: float | Schedule = 0.5
    label_weight: float | Schedule | None = None
    logits: LogitLossConfig | None = Field(default_factory=LogitLossConfig)
    features: dict[str, FeatureLossConfig] = Field(default_factory=dict)
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)
