"""Construction of networks by name, from torchvision, timm or user code, with a choice of ResNet stem.

Random initial weights depend only on `seed`, so teacher and student can be built in any order. Building a network leaves the
global random generators unchanged.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kd_accel.config.schema import Stem
from kd_accel.errors import UserError, describe_error
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
    """Build a network with random weights.

    Args:
        arch: `torchvision/NAME`, `timm/NAME` or `import:package.module:function`.
        num_classes: Number of logits.
        stem: `imagenet` keeps the library's stem, `no_pool` removes its max-pool, and `cifar` also replaces its convolution by
            a 3x3 convolution of stride 1 (He et al., CVPR 2016, section 4.2).
        arch_args: Further keyword arguments of the function that builds the network.
        seed: Seed of the initial weights.
        field: Config section of the network, for error messages.

    Returns:
        Network that maps normalized images [B, 3, H, W] to logits [B, num_classes].

    Raises:
        UserError: If the name or an argument is not valid, or the network does not have a stem that can be replaced.
    """
    if "num_classes" in (arch_args or {}):
        raise UserError(f"{field}.arch_args: num_classes is set by the data; leave it out")
    loading = sorted(_LOADING_ARGS & (arch_args or {}).keys())
    if loading and not arch.startswith(PREFIX):
        raise UserError(f"{field}.arch_args: {', '.join(loading)} would load weights unchecked; use {field}.weights instead")
    arguments = {**(arch_args or {}), "num_classes": num_classes}
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the generators of the GPUs, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        model = _user_model(arch, arguments, field) if arch.startswith(PREFIX) else _library_model(arch, arguments, field)
        if stem != "imagenet":
            _replace_stem(model, stem, f"{field}.stem", arch)
    return model


def _user_model(arch: str, arguments: dict[str, Any], field: str) -> nn.Module:
    model = call_import(
        arch,
        (),
        arguments,
        field=f"{field}.arch",
        called_with=f"{', '.join(arguments)}, by keyword: num_classes and {field}.arch_args",
        arguments_field=f"{field}.arch_args",
    )
    if not isinstance(model, nn.Module):
        raise UserError(f"{field}.arch: {arch} returns {type(model).__name__}, not a torch.nn.Module; fix the function")
    return model


def _library_model(arch: str, arguments: dict[str, Any], field: str) -> nn.Module:
    library, _, name = arch.partition("/")
    if library not in _LIBRARIES:
        raise UserError(f"{field}.arch: {arch!r} must start with torchvision/, timm/ or {PREFIX} ({_suggestion(arch)})")
    try:
        return _LIBRARIES[library](name, arguments, f"{field}.arch")
    except UserError:
        raise
    except Exception as error:
        # Each library raises its own exceptions.
        reason = describe_error(error)
        if arch_args := {key: value for key, value in arguments.items() if key != "num_classes"}:
            raise UserError(f"{field}.arch_args: {arch} does not accept {arch_args} ({reason}); fix or remove them") from None
        raise UserError(f"{field}.arch: {arch} cannot be built ({reason}); use another arch") from None


def _suggestion(arch: str) -> str:
    from torchvision import models

    name = arch.rpartition("/")[2]
    close = difflib.get_close_matches(name, models.list_models(module=models), n=1)
    return f"did you mean torchvision/{close[0]}?" if close else "for example torchvision/resnet18"


def _from_torchvision(name: str, arguments: dict[str, Any], field: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UserError(_unknown(f"torchvision/{name}", models.list_models(module=models), field))
    if arguments.get("aux_logits") and name in _WITH_AUXILIARY_HEADS:
        raise UserError(
            f"{field}_args: aux_logits adds outputs of auxiliary heads, which no loss of this program uses; leave it out"
        )
    return models.get_model(name, weights=None, **{**_default_args(name), **arguments})


def _default_args(name: str) -> dict[str, Any]:
    """Return arguments that remove the auxiliary heads of GoogLeNet and Inception v3, which change the type of the output.

    `init_weights` is set because torchvision warns that its default will change.
    """
    return {"init_weights": True, "aux_logits": False} if name in _WITH_AUXILIARY_HEADS else {}


def _from_timm(name: str, arguments: dict[str, Any], field: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError(f"{field}: timm/{name} needs timm; pip install 'kd-accel[timm]'") from None
    if not timm.is_model(name):
        raise UserError(_unknown(f"timm/{name}", timm.list_models(), field))
    return timm.create_model(name, pretrained=False, **arguments)


_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_LIBRARIES = {"torchvision": _from_torchvision, "timm": _from_timm}
_LOADING_ARGS = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "weights",
    "weights_backbone",
}
"""Arguments for which the libraries read files, including pickles, or download weights."""


def _unknown(arch: str, names: list[str], field: str) -> str:
    library, _, name = arch.partition("/")
    close = [f"{library}/{match}" for match in difflib.get_close_matches(name, names, n=3)]
    advice = f"did you mean {' or '.join(close)}?" if close else f"use one of its classifiers, for example {library}/resnet18"
    return f"{field}: {library} has no classifier {name!r}; {advice}"


def _replace_stem(model: nn.Module, stem: Stem, field: str, arch: str) -> None:
    """Replace the stem of a ResNet in place. torchvision and timm use the same module names."""
    conv, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(pool, nn.Module):
        raise UserError(
            f"{field}: {stem!r} needs a ResNet whose stem is one convolution and a max-pool, unlike {arch}; use imagenet"
        )
    model.maxpool = nn.Identity()
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, conv.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
