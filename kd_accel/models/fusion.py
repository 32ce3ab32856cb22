"""A teacher whose BatchNorm layers are part of the convolutions before them: the same function, fewer passes over the maps.

In evaluation mode BatchNorm is a scale and a shift per channel, so a convolution in front of it can do both (Jacob et al. 2018,
section 3.2). Which layers follow each other is read from a trace by torch.fx; the network itself stays what it is, so layers keep
their names.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_PROBED_IMAGES = 2
_TOLERANCE = 1e-3


def fuse_conv_bn(model: nn.Module, *, layers: Collection[str], image_size: int) -> nn.Module | None:
    """A copy in evaluation mode with every BatchNorm folded that directly follows a convolution.

    None where there is nothing to fold, where a layer would change (it gives a convolution's output before its BatchNorm), or
    where the network cannot be traced or does anything with these layers but call them once.
    """
    own = copy.deepcopy(model).eval()
    pairs = _followers(own)
    if not pairs or any(_lies_between(layer, *pair) for layer in layers for pair in pairs):
        return None
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(own.get_submodule(convolution), own.get_submodule(norm))  # type: ignore[type-var, arg-type]
        own.set_submodule(convolution, fused)
        own.set_submodule(norm, nn.Identity())
    return own.requires_grad_(False) if _agree(model, own, image_size) else None


def _followers(model: nn.Module) -> list[tuple[str, str]]:
    """(convolution, BatchNorm) by name, for each BatchNorm whose only input is that convolution's only use."""
    try:
        nodes = list(fx.symbolic_trace(model).graph.nodes)
    except Exception:  # whatever a model's own code does with values that are not there yet
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(id(modules[node.target]) for node in nodes if node.op == "call_module")
    pairs = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if not (_calls(node, modules, nn.BatchNorm2d) and isinstance(before, fx.Node) and _calls(before, modules, nn.Conv2d)):
            continue
        is_alone = len(before.users) == 1 and uses[id(modules[before.target])] == uses[id(modules[node.target])] == 1
        if is_alone and modules[node.target].track_running_stats:
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _calls(node: fx.Node, modules: dict[str, nn.Module], kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and type(modules[str(node.target)]) is kind


def _lies_between(layer: str, convolution: str, norm: str) -> bool:
    """The recorded module holds, or is, the convolution and not its BatchNorm."""
    return f"{convolution}.".startswith(f"{layer}.") and not f"{norm}.".startswith(f"{layer}.")


@torch.no_grad()
def _agree(model: nn.Module, own: nn.Module, image_size: int) -> bool:
    """Whether both give the same; code that reaches into a layer would not find what it looks for."""
    mode, parameter = model.training, next(model.parameters())
    images = torch.randn(_PROBED_IMAGES, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    model.eval()
    try:
        expected, found = model(images), own(images)
        return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
    except Exception:  # of the user's own forward
        return False
    finally:
        model.train(mode)
