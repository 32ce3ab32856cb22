"""Building networks by name: torchvision's, timm's, or the user's own; the three stems of a ResNet.

Parameters drawn at random depend on `seed` alone: teacher and student can be built in any order, and neither moves the
generator that dropout draws from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kd_accel.config.schema import Stem
from kd_accel.errors import UserError
from kd_accel.io.user_code import PREFIX, call_import


def build_model(
    arch: str,
    *,
    num_classes: int,
    stem: Stem = "imagenet",
    arch_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    field: str = "model",
) -> nn.Module:
    """A fresh network that takes normalized images [B, 3, H, W] and gives logits [B, num_classes].

    stem: imagenet = as the library builds it; no_pool = without the max-pool; cifar = a 3x3 stride-1 convolution without it.
    field: the section of the config that names the arch, for messages. Raises UserError for an unknown name or argument.
    """
    if "num_classes" in (arch_args or {}):
        raise UserError(f"{field}.arch_args: num_classes is set by the data; leave it out")
    loading = sorted(_LOADING & (arch_args or {}).keys())
    if loading and not arch.startswith(PREFIX):
        raise UserError(f"{field}.arch_args: {', '.join(loading)} would load weights past all checks; use {field}.weights")
    arguments = {**(arch_args or {}), "num_classes": num_classes}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also move the generators of the GPUs
        model = _own_model(arch, arguments, field) if arch.startswith(PREFIX) else _library_model(arch, arguments, field)
        if stem != "imagenet":
            _replace_stem(model, stem, f"{field}.stem", arch)
    return model


def _own_model(arch: str, arguments: dict[str, Any], field: str) -> nn.Module:
    model = call_import(
        arch,
        (),
        arguments,
        field=f"{field}.arch",
        called_with=f"{', '.join(arguments)}, by name: num_classes and what arch_args holds",
        blame=f"{field}.arch_args",
    )
    if not isinstance(model, nn.Module):
        raise UserError(f"{field}.arch: {arch} gave {type(model).__name__}, not a torch.nn.Module")
    return model


def _library_model(arch: str, arguments: dict[str, Any], field: str) -> nn.Module:
    library, _, name = arch.partition("/")
    if library not in _LIBRARIES:
        raise UserError(f"{field}.arch: {arch!r} must start with torchvision/, timm/ or {PREFIX}; {_suggestion(arch)}")
    try:
        return _LIBRARIES[library](name, arguments, f"{field}.arch")
    except UserError:
        raise
    except Exception as error:  # each builder refuses in its own way
        own = {key: value for key, value in arguments.items() if key != "num_classes"}
        said = f"{field}.arch_args: {arch} does not take {own}" if own else f"{field}.arch: {arch} cannot be built"
        raise UserError(f"{said} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from None


def _suggestion(arch: str) -> str:
    from torchvision import models

    name = arch.rpartition("/")[2]
    close = difflib.get_close_matches(name, models.list_models(module=models), n=1)
    return f"did you mean torchvision/{close[0]}?" if close else "such as torchvision/resnet18"


def _from_torchvision(name: str, arguments: dict[str, Any], field: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UserError(_unknown(f"torchvision/{name}", models.list_models(module=models), field))
    return models.get_model(name, weights=None, **_quiet_inception(name), **arguments)


def _quiet_inception(name: str) -> dict[str, Any]:
    """These two draw their weights in a slow and deprecated way unless told; and their auxiliary heads change the output."""
    if name == "googlenet":
        return {"init_weights": True, "aux_logits": False}
    return {"init_weights": True, "aux_logits": False} if name == "inception_v3" else {}


def _from_timm(name: str, arguments: dict[str, Any], field: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError(f"{field}: timm/{name} needs timm; pip install 'kd-accel[timm]'") from None
    if not timm.is_model(name):
        raise UserError(_unknown(f"timm/{name}", timm.list_models(), field))
    return timm.create_model(name, pretrained=False, **arguments)


_LIBRARIES = {"torchvision": _from_torchvision, "timm": _from_timm}
_LOADING = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "weights",
    "weights_backbone",
}
"""Arguments by which the libraries read files, pickles among them, or download."""


def _unknown(arch: str, names: list[str], field: str) -> str:
    library, _, name = arch.partition("/")
    close = [f"{library}/{match}" for match in difflib.get_close_matches(name, names, n=3)]
    advice = f"did you mean {' or '.join(close)}?" if close else f"name one that it has, such as {library}/resnet18"
    return f"{field}: {library} has no classifier {name!r}; {advice}"


def _replace_stem(model: nn.Module, stem: Stem, field: str, arch: str) -> None:
    """ResNets of torchvision and timm name their stem alike."""
    conv, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(pool, nn.Module):
        raise UserError(f"{field}: {stem} is for ResNets with a 7x7 convolution and a max-pool; {arch} is none: use imagenet")
    model.maxpool = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, conv.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
