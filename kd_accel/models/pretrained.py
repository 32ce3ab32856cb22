"""Classes and preprocessing of pretrained weights, from the run or the library that they belong to; no network access.

torchvision keeps them with its weights (`transforms()`, `meta`), timm in `pretrained_cfg`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd_accel.io.files import is_directory
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
        is_of_run: Whether the weights are those of a run of this program, whose class names are those of its data.
    """

    mean: list[float] | None = None
    std: list[float] | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    image_size: int | None = None
    is_of_run: bool = False


def weights_info(weights: str, arch: str) -> WeightsInfo:
    """Look up classes and preprocessing of weights.

    Args:
        weights: Run directory, .safetensors file or name of pretrained weights, as `model.weights` of a config.
        arch: Name of the architecture.

    Returns:
        What is known; nothing for other files, and for names that the library does not have, which `load_weights` refuses.

    Raises:
        UserError: If model.json of a run is damaged.
    """
    path = Path(weights)
    directory = path.parent if path.name == "model.safetensors" and (path.parent / "model.json").is_file() else path
    if is_directory(directory):
        card = load_card(directory)
        names = tuple(card.label_names)
        return WeightsInfo(list(card.mean), list(card.std), len(names), names, card.image_size, is_of_run=True)
    library, _, name = arch.partition("/")
    if path.suffix == ".safetensors" or library not in ("torchvision", "timm"):
        return WeightsInfo()
    return _of_torchvision(name, weights) if library == "torchvision" else _of_timm(name, weights)


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
    transforms, names = known[weights].transforms(), tuple(known[weights].meta["categories"])
    return WeightsInfo(list(transforms.mean), list(transforms.std), len(names), names, transforms.crop_size[0])


def _of_timm(name: str, weights: str) -> WeightsInfo:
    try:
        import timm

        config = timm.get_pretrained_cfg(name if weights == "pretrained" else f"{name}.{weights}")
    except (ImportError, RuntimeError):  # RuntimeError: an unknown tag
        return WeightsInfo()
    if config is None:
        return WeightsInfo()
    names = tuple(config.label_names) if config.label_names else None
    return WeightsInfo(list(config.mean), list(config.std), config.num_classes, names, config.input_size[-1])
