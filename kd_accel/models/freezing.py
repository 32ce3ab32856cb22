"""Freezing of parts of a network: their parameters are not trained, and they stay in evaluation mode.

In: a network and names of its modules. Out: the modules, for the caller to return to evaluation mode after each `train()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kd_accel.errors import UserError
from kd_accel.models.feature_extractor import FeatureExtractor, find_module
from kd_accel.models.modes import in_evaluation_mode


def freeze_modules(network: nn.Module, names: Sequence[str], *, field: str = "freeze") -> list[nn.Module]:
    """Exclude the parameters of some modules from training, and switch these modules to evaluation mode, in place.

    A BatchNorm layer in evaluation mode normalizes with its running statistics, and does not change them.

    Args:
        network: Network that contains the modules.
        names: Names of the modules, as in `network.named_modules()`; each stands for all modules in it.
        field: Config key or argument that lists the names, for error messages.

    Returns:
        The modules. A later `network.train()` ends their evaluation mode.

    Raises:
        UserError: If a name is not a module of the network, or no parameter would be trained.
    """
    modules = [find_module(network, name, field) for name in names]
    for module in modules:
        module.requires_grad_(False).eval()
    if modules and not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError(f"{field}: {', '.join(names)} leaves no parameter of the model to train; freeze fewer modules")
    return modules


def frozen_layers(network: nn.Module, names: Sequence[str], *, image_size: int) -> list[str]:
    """Return the layers whose output depends on no parameter that is trained. The network is not changed.

    Args:
        network: Network of which some modules are frozen.
        names: Names of layers that `probe_layers` accepts.
        image_size: Height and width of the images, in pixels.
    """
    images = torch.zeros(1, 3, image_size, image_size, device=next(network.parameters()).device)
    recorder = FeatureExtractor(network, names)
    with in_evaluation_mode(network), torch.enable_grad(), torch.random.fork_rng(devices=[]), recorder:
        network(images)
        return [name for name, feature in recorder.take().items() if not feature.requires_grad]
