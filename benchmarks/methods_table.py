"""Methods that benchmarks.methods compares: loss, layers, weights and their sources.

Logit losses have the weights of their papers. A feature loss is added to the cross-entropy, without a logit loss, as in Tian et
al., "Contrastive Representation Distillation", ICLR 2020, and has the weight of its source, converted where the source defines
the loss by another sum or mean. The weight depends on the sizes of the maps, so a tenth and ten times the weight are tried too.

Two targets of one layer of the teacher need two names. The last block of a stage has the same output as the stage, so
`layer1.1` has the attention map where `layer1` has the map itself, and one cache serves all methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd_accel.losses.registry import names

FACTORS = (1.0, 0.1, 10.0)
"""Factors of the weight of a feature loss; the first of them is that of the source."""
SEEDS = (0, 1, 2)
STAGES = ("layer1", "layer2", "layer3", "layer4")
_ATTENTION = {stage: f"{stage}.1" for stage in STAGES[:3]}
_EMBEDDING = {"layer4": "layer4.1"}


@dataclass(frozen=True)
class Method:
    """Training of the student by one method.

    Args:
        name: Name in the table.
        source: Origin of the weights.
        loss: Registered name of the loss; None = training on labels alone.
        temperature: Temperature of a logit loss.
        weight: Weight of the loss: `alpha` of a logit loss, the factor of a feature loss.
        label_weight: Weight of the cross-entropy.
        args: Settings of the loss.
        layers: Layers of a feature loss as {student's: teacher's}; empty = a logit loss.
        has_seeds: Whether the method is trained with all seeds, or with the first seed alone.
    """

    name: str
    source: str
    loss: str | None = None
    temperature: float | None = None
    weight: float = 0.0
    label_weight: float = 1.0
    args: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    has_seeds: bool = False

    @property
    def is_tuned(self) -> bool:
        """Return whether several weights are tried: those of feature losses."""
        return bool(self.layers)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of the method."""
        return SEEDS if self.has_seeds else SEEDS[:1]

    @property
    def factors(self) -> tuple[float, ...]:
        """Return the factors of the weight that are tried."""
        return FACTORS if self.is_tuned else FACTORS[:1]

    def scaled_weight(self, factor: float) -> float:
        """Return the weight times a factor, rounded to the digits of the weight."""
        return float(f"{self.weight * factor:.6g}")

    def distill(self, factor: float = 1.0) -> dict[str, Any] | None:
        """Return the section `distill` of the config, with a factor of the weight; None without a teacher."""
        if self.loss is None:
            return None
        weight = self.scaled_weight(factor)
        if self.layers:
            settings = {"loss": self.loss, "weight": weight, "layers": dict(self.layers), "args": dict(self.args)}
            return {"logits": None, "label_weight": self.label_weight, "features": {self.name: settings}}
        logits = {"loss": self.loss, "args": dict(self.args)}
        # Without a temperature in the formula, the setting keeps its default.
        heat = {} if self.temperature is None else {"temperature": self.temperature}
        return {**heat, "alpha": weight, "label_weight": self.label_weight, "logits": logits}


def _stages(*chosen: str) -> dict[str, str]:
    return {stage: stage for stage in chosen or STAGES}


_HINTON: dict[str, Any] = {"loss": "kl", "temperature": 4.0, "weight": 0.9, "label_weight": 0.1}

METHODS = (
    Method("plain", "labels alone", has_seeds=True),
    Method("kl", "Hinton et al. 2015, with the values of Tian et al. 2020", **_HINTON, has_seeds=True),
    Method("dkd", "Zhao et al. 2022, CIFAR-100", "dkd", 4.0, 1.0, args={"alpha": 1.0, "beta": 8.0}, has_seeds=True),
    Method("dist", "Huang et al. 2022, CIFAR-100", "dist", 4.0, 1.0, args={"beta": 2.0, "gamma": 2.0}, has_seeds=True),
    Method("kl-standardized", "Sun et al. 2024, CIFAR-100", "kl", 2.0, 9.0, 0.1, args={"standardize": True}, has_seeds=True),
    Method(
        "mse",
        "Romero et al. 2015, with layer and weight of Tian et al. 2020",
        "mse",
        weight=100.0,
        args={"direction": "student_to_teacher"},
        layers=_stages("layer2"),
        has_seeds=True,
    ),
    Method("rkd", "Park et al. 2019, as in Tian et al. 2020", "rkd", weight=1.0, layers=_EMBEDDING, has_seeds=True),
    Method("kl-reverse", "as `kl`", **_HINTON, args={"divergence": "reverse"}),
    Method("kl-js", "as `kl`", **_HINTON, args={"divergence": "js"}),
    Method("kl-mse", "Ba, Caruana 2014: logits alone", "kl", None, 1.0, 0.0, args={"divergence": "mse"}),
    Method("nkd", "Yang et al. 2023, code for ResNet-34 to ResNet-18 on CIFAR-100", "nkd", 3.0, 1.0, args={"gamma": 3.5}),
    Method(
        "at",
        "Tian et al. 2020: 1000 times the squared distance over 64 pixels has this gradient at a distance of 0.3",
        "at",
        weight=10.0,
        layers=_ATTENTION,
    ),
    Method("cosine", "Chen et al. 2022, code for CIFAR-100", "cosine", weight=25.0, layers=_stages("layer4")),
    Method("crd", "Tian et al. 2020", "crd", weight=0.8, args={"nce_k": 16384}, layers=_EMBEDDING),
    Method(
        "mgd",
        "Yang et al. 2022: 7e-5 for the sum over 49 pixels, times 49 for the sum over one",
        "mgd",
        weight=3.4e-3,
        layers=_stages("layer4"),
    ),
    Method(
        "pkt",
        "Tian et al. 2020: 30000 times the mean over the pairs of 64 samples, a sum over 64 samples here",
        "pkt",
        weight=470.0,
        layers=_EMBEDDING,
    ),
    Method("review", "Chen et al. 2021, ImageNet; without its warm-up", "review", weight=1.0, layers=_stages()),
    Method("sp", "Tung, Mori 2019", "sp", weight=3000.0, layers=_stages("layer4")),
)
"""All methods, those of several seeds first."""


def missing_methods() -> list[str]:
    """Return the registered losses that no method uses."""
    used = {(bool(method.layers), method.loss) for method in METHODS}
    registered = [(kind == "features", name) for kind in ("logits", "features") for name in names(kind)]
    return [name for is_feature, name in registered if (is_feature, name) not in used]


def chosen_methods(chosen: Sequence[str]) -> tuple[Method, ...]:
    """Return the methods of these names, in the order of the table. Raises ValueError if a name is not a method."""
    if unknown := set(chosen) - {method.name for method in METHODS}:
        raise ValueError(f"{', '.join(sorted(unknown))}: not found among the methods")
    return tuple(method for method in METHODS if method.name in chosen)


def features_of_cache() -> dict[str, Any]:
    """Return the section `distill.features` with the features of all methods, from which the cache is built."""
    sections = (method.distill() for method in METHODS if method.layers)
    return {name: settings for section in sections if section for name, settings in section["features"].items()}


def settings_table() -> str:
    """Format the settings of all methods as a Markdown table, which docs/methods.md contains."""
    header = ["method", "loss, settings", "T", "weight", "weight of the labels", "layers", "seeds", "source"]
    rows = [header, ["---", "---", "---:", "---:", "---:", "---", "---:", "---"], *map(_settings_row, METHODS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _settings_row(method: Method) -> list[str]:
    settings = "".join(f", `{name}: {str(value).lower()}`" for name, value in method.args.items())
    return [
        method.name,
        f"`{method.loss}`{settings}" if method.loss else "",
        f"{method.temperature:g}" if method.temperature else "",
        f"{method.weight:g}" if method.loss else "",
        f"{method.label_weight:g}",
        ", ".join(method.layers),
        str(len(method.seeds)),
        method.source,
    ]
