"""`kd-accel layers`: the layers of a network that a feature loss can compare."""

from __future__ import annotations

from pathlib import Path

from kd_accel.config.schema import Stem
from kd_accel.errors import UserError
from kd_accel.io.files import is_directory
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import feature_maps
from kd_accel.models.weights import load_run_model

_IMAGE_SIZE, _NUM_CLASSES = 32, 10


def run_layers(network: str, *, image_size: int | None, stem: Stem, is_deep: bool) -> None:
    """Print a line for each layer: its name and the shape of its feature map, D x H x W.

    Args:
        network: Run directory or architecture.
        image_size: Side of the images in pixels; None = that of the run, or 32.
        stem: First layers of an architecture that is a ResNet.
        is_deep: Whether layers inside other layers are listed.

    Raises:
        UserError: If the network is not found, or does not accept images of this size.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image_size: {image_size} must be at least 1")
    if is_directory(network):
        model, card = load_run_model(Path(network), field=network)
        size = image_size or card.image_size
    else:
        model = build_model(network, num_classes=_NUM_CLASSES, stem=stem, field="layers")
        size = image_size or _IMAGE_SIZE
    shapes = {name: shape for name, shape in feature_maps(model, image_size=size).items() if is_deep or "." not in name}
    if not shapes:
        raise UserError(
            f"{network}: no layer has a feature map [batch, channels, height, width]; add --all to list inner layers"
        )
    width = max(map(len, shapes))
    print(f"{network}, images of {size}x{size} pixels:")
    for name, shape in shapes.items():
        print(f"  {name:{width}}  {'x'.join(map(str, shape))}")
