"""Classes, preprocessing and accuracy of pretrained weights, from their run or library; no network access.

torchvision keeps them with its weights (`transforms()`, `meta`), timm, without the accuracy, in `pretrained_cfg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

from kd_accel.config.rules import BEST_WEIGHTS, RUN_WEIGHTS
from kd_accel.config.schema import Stem
from kd_accel.config.teacher_schema import TeacherInterpolation
from kd_accel.errors import UserError
from kd_accel.io.files import is_directory, read_json
from kd_accel.models.weights import load_card

_LISTED = 3


@dataclass(frozen=True)
class WeightsInfo:
    """Facts about weights.

    Attributes:
        mean: Channel means in 0..1 with which the weights were trained; None if unknown.
        std: Channel standard deviations in 0..1; None if unknown.
        num_classes: Number of classes; None if unknown.
        class_names: Class names in the order of the logits; None if unknown.
        image_size: Height and width of the images in pixels; None if unknown.
        interpolation: Interpolation with which photos were resized; None if unknown.
        crop_pct: Side of the central square that was evaluated, as a fraction of the shorter side of a photo; None if unknown.
        accuracy: Accuracy that the weights are stated to have, a fraction of 1; None if none is stated.
        data: Name of the library's data on which that accuracy was measured.
        is_of_run: Whether the weights are those of a run of this program, whose class names are those of its data.
        network: `arch`, `stem` and `arch_args` of the network of the run; empty for other weights.
    """

    mean: list[float] | None = None
    std: list[float] | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    image_size: int | None = None
    interpolation: TeacherInterpolation | None = None
    crop_pct: float | None = None
    accuracy: float | None = None
    data: str = ""
    is_of_run: bool = False
    network: Mapping[str, Any] = field(default_factory=dict)

    def other_network(self, arch: str, stem: Stem, arch_args: Mapping[str, Any]) -> str:
        """Describe in which settings a network differs from that of the run; empty if in none, or for other weights.

        Stem and arguments can change the outputs without changing a tensor's shape, so that the weights fit.

        Args:
            arch: Name of the architecture.
            stem: Stem of a ResNet.
            arch_args: Further arguments of the architecture's builder.
        """
        given = {"arch": arch, "stem": stem, "arch_args": dict(arch_args)}
        return ", ".join(f"{name} {value}" for name, value in self.network.items() if given[name] != value)


def weights_info(weights: str, arch: str) -> WeightsInfo:
    """Look up classes and preprocessing of weights.

    Args:
        weights: Run directory, .safetensors file or name of pretrained weights, as `model.weights` of a config.
        arch: Name of the architecture.

    Returns:
        What is known; nothing for other files, and for names that the library does not have, which `load_weights` refuses.

    Raises:
        UserError: If model.json of a run is damaged, or missing next to the weights of the best epoch.
    """
    path = Path(weights)
    directory = path.parent if path.name in RUN_WEIGHTS and (path.parent / "model.json").is_file() else path
    if path.name == BEST_WEIGHTS and directory == path and path.is_file():
        raise UserError(
            f"{path}: belongs to a run that is not finished (model.json is missing), whose preprocessing is unknown; finish "
            "the run, or copy the file to another name to use the weights alone"
        )
    if is_directory(directory):
        info = run_info(directory)
        # The stated accuracy is that of the last epoch.
        return replace(info, accuracy=None) if path.name == BEST_WEIGHTS else info
    library, _, name = arch.partition("/")
    if path.suffix == ".safetensors" or library not in ("torchvision", "timm"):
        return WeightsInfo()
    return _of_torchvision(name, weights) if library == "torchvision" else _of_timm(name, weights)


def run_info(directory: Path) -> WeightsInfo:
    """Return the facts about the model of a run. Raises UserError if its model.json is missing or damaged."""
    card = load_card(directory)
    names = tuple(card.label_names)
    return WeightsInfo(
        card.mean,
        card.std,
        len(names),
        names,
        card.image_size,
        "bicubic",  # data/decode.py
        accuracy=_accuracy_of_run(directory),
        is_of_run=True,
        network={"arch": card.arch, "stem": card.stem, "arch_args": card.arch_args},
    )


def weights_names(arch: str) -> list[str]:
    """Return the names of the pretrained weights that the library has for an architecture, without aliases; may be empty."""
    library, _, name = arch.partition("/")
    if library == "torchvision":
        from torchvision import models

        return [each.name for each in models.get_model_weights(name)]
    if library == "timm":
        import timm

        return [each.partition(".")[2] for each in timm.list_pretrained(name) if each.partition(".")[0] == name]
    return []


def random_weights_notices(arch: str) -> list[str]:
    """Return a line for a network of a library that is built without weights: it starts from random weights."""
    library, _, name = arch.partition("/")
    if library not in ("torchvision", "timm"):
        return []
    known = [each or "pretrained" for each in weights_names(arch)]
    more = ", ..." if len(known) > _LISTED else ""
    remedy = f"; {library} has {', '.join(known[:_LISTED])}{more} for model.weights" if known else ""
    return [f"model.weights: null, so that {library}/{name} starts from random weights{remedy}"]


def _of_torchvision(name: str, weights: str) -> WeightsInfo:
    from torchvision import models

    known = models.get_model_weights(name).__members__ if name in models.list_models(module=models) else {}
    if weights not in known:
        return WeightsInfo()
    transforms, meta = known[weights].transforms(), known[weights].meta
    (crop,), (resize,), ((data, figures),) = transforms.crop_size, transforms.resize_size, meta["_metrics"].items()
    names = meta["categories"]  # None for weights without a classifier, which have no accuracy either
    return WeightsInfo(
        list(transforms.mean),
        list(transforms.std),
        len(names) if names else None,
        tuple(names) if names else None,
        crop,
        _smooth(transforms.interpolation.value),
        crop / resize,
        figures["acc@1"] / 100 if names else None,
        data,
    )


def _of_timm(name: str, weights: str) -> WeightsInfo:
    try:
        import timm

        config = timm.get_pretrained_cfg(name if weights == "pretrained" else f"{name}.{weights}")
    except (ImportError, RuntimeError):  # RuntimeError: an unknown tag
        return WeightsInfo()
    if config is None:
        return WeightsInfo()
    names = tuple(config.label_names) if config.label_names else None
    size, interpolation = config.input_size[-1], _smooth(config.interpolation)
    crop_pct = config.crop_pct
    return WeightsInfo(list(config.mean), list(config.std), config.num_classes, names, size, interpolation, crop_pct)


def _smooth(interpolation: str) -> TeacherInterpolation | None:
    """Return an interpolation of a library's card; None for one that `Resize` does not have."""
    return cast(TeacherInterpolation, interpolation) if interpolation in get_args(TeacherInterpolation) else None


def _accuracy_of_run(directory: Path) -> float | None:
    """Return the accuracy in summary.json of a run; None without a valid one, because only a notice depends on it."""
    try:
        accuracy = read_json(directory / "summary.json", remedy="").get("accuracy")
    except UserError:
        return None
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 1 else None
