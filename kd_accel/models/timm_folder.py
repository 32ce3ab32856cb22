"""Folder of a network of timm: its config.json, and the network as timm loads it from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kd_accel.errors import UserError, describe_error
from kd_accel.models.card import ModelCard

_KEPT = ("classifier", "first_conv", "fixed_input_size", "pool_size")
"""Entries of timm's own config of an architecture that hold for any weights."""


def is_timm(card: ModelCard) -> bool:
    """Return whether timm itself can build the network; it has no setting for another stem."""
    return card.arch.startswith("timm/") and card.stem == "imagenet"


def timm_config(network: nn.Module, card: ModelCard) -> dict[str, Any]:
    """Return the config.json with which timm builds a network, without the weights.

    Args:
        network: Network that timm has built, with its `pretrained_cfg`.
        card: Its card.
    """
    of_arch: dict[str, Any] = dict(getattr(network, "pretrained_cfg", {}))
    arguments = dict(card.arch_args)
    if of_arch.get("fixed_input_size") and of_arch.get("input_size"):
        # timm would take the size of position embeddings from the new input_size.
        arguments.setdefault("img_size", of_arch["input_size"][-1])
    return {
        "architecture": card.arch.partition("/")[2].partition(".")[0],
        "num_classes": len(card.label_names),
        "label_names": card.label_names,
        "model_args": arguments,
        "pretrained_cfg": {
            **{name: of_arch[name] for name in _KEPT if of_arch.get(name) is not None},
            "custom_load": False,
            "input_size": [3, card.image_size, card.image_size],
            "interpolation": card.interpolation,
            "crop_pct": card.crop_pct,
            "mean": card.mean,
            "std": card.std,
            "num_classes": len(card.label_names),
        },
    }


def load_timm_folder(directory: Path) -> nn.Module:
    """Load a network with timm alone, in evaluation mode.

    Args:
        directory: Folder with config.json and model.safetensors.

    Raises:
        UserError: If timm is too old for local folders, or does not build the network.
    """
    import timm

    try:
        return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    except Exception as error:
        # timm has no exception of its own.
        raise UserError(
            f"export: timm {timm.__version__} cannot load the folder ({describe_error(error)}), which needs timm "
            "1.0.16 or later; pip install --upgrade timm"
        ) from None
