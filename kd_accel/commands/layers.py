"""`kd-accel layers`: the layers of a network that a feature loss can compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kd_accel.config.schema import Stem
from kd_accel.errors import UserError
from kd_accel.io.files import is_directory
from kd_accel.io.safe_yaml import load_yaml
from kd_accel.models.auto_layers import auto_layers
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import feature_maps
from kd_accel.models.weights import load_run_model

_IMAGE_SIZE, _NUM_CLASSES = 32, 10


def run_layers(network: str, *, image_size: int | None, stem: Stem, arch_args: str | None, is_deep: bool) -> None:
    """Print a line for each layer: its name, the shape D x H x W of its feature map, and `auto` if `layers: auto` compares it.

    Args:
        network: Run directory or architecture.
        image_size: Side of the images in pixels; None = that of the run, or 32.
        stem: First layers of an architecture that is a ResNet.
        arch_args: Arguments of an architecture's builder, a mapping as YAML text.
        is_deep: Whether layers inside other layers are listed, in addition to those that `layers: auto` compares.

    Raises:
        UserError: If the network is not found, has no feature map, or does not accept images of this size.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image_size: {image_size} must be at least 1")
    if is_directory(network):
        if arch_args is not None:
            raise UserError("--arch_args: has no effect for a run, whose model.json has the arguments; leave it out")
        model, card = load_run_model(Path(network), field=network)
        size = image_size or card.image_size
    else:
        model = build_model(network, num_classes=_NUM_CLASSES, stem=stem, arch_args=_arguments(arch_args), field="layers")
        size = image_size or _IMAGE_SIZE
    maps, chosen = feature_maps(model, image_size=size), auto_layers(model, image_size=size, field=network)
    shapes = {name: "x".join(map(str, maps[name])) for name in maps if is_deep or "." not in name or name in chosen}
    width, shape_width = max(map(len, shapes)), max(map(len, shapes.values()))
    print(f"{network}, images of {size}x{size} pixels:")
    for name, shape in shapes.items():
        print(f"  {name:{width}}  {f'{shape:{shape_width}}  auto' if name in chosen else shape}")


def _arguments(text: str | None) -> dict[str, Any]:
    """Parse the arguments of an architecture. Raises UserError if the text is not a mapping."""
    try:
        arguments = load_yaml(text or "{}")
    except (yaml.YAMLError, ValueError):
        arguments = None
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise UserError(f"--arch_args: must be settings as '{{key: value}}', not {text!r}")
    return arguments
