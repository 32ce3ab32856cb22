"""Feature maps [B, D, H, W] from the outputs of layers: maps, channels-last maps, and the tokens of transformers.

All results are views of the output, so no copy is made and gradients reach the network.

Shapes: B batch, D channels, H height, W width, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from torch import Tensor, nn

_PREFIX_PARAMETERS = {"cls_token", "class_token", "dist_token", "distillation_token", "reg_token", "register_tokens"}


def prefix_tokens(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """Count the tokens that precede those of the image in the output of each layer: class, distillation, register tokens.

    Args:
        model: Network. The number is its `num_prefix_tokens`, which timm sets and a user's network may set; else that of the
            parameters with the usual names of such tokens, [..., number, D], such as torchvision's `class_token`.
        layers: Names of the layers. `patch_embed` runs before these tokens are added.

    Returns:
        Number of tokens by layer; 0 for a network without tokens.
    """
    number = getattr(model, "num_prefix_tokens", None)
    if not isinstance(number, int):
        tokens = (weight for name, weight in model.named_parameters() if name.rpartition(".")[2] in _PREFIX_PARAMETERS)
        number = sum(weight.shape[-2] for weight in tokens if weight.dim() > 1)
    return {layer: 0 if layer.partition(".")[0] == "patch_embed" else number for layer in layers}


def as_map(output: Any, prefix: int) -> Tensor | None:
    """View the output of a layer for square images as a feature map.

    - [B, D, H, W] is returned as it is.
    - [B, H, W, D] with H = W other than D is turned. H = W = D counts as [B, D, H, W].
    - Tokens [B, N, D] lose their prefix, and become the rows of a square. A layer that runs before the prefix is added, as
      most of CaiT, has a square number of tokens without it.

    Args:
        output: Output of the layer.
        prefix: Number of tokens that precede those of the image, as `prefix_tokens` counts them.

    Returns:
        View [B, D, H, W]; None for any other output.
    """
    if not isinstance(output, Tensor):
        return None
    if output.dim() == 4:
        is_last = output.shape[1] == output.shape[2] != output.shape[3]
        return output.permute(0, 3, 1, 2) if is_last else output
    if output.dim() != 3 or output.shape[1] <= prefix:
        return None
    for dropped in (prefix, 0):
        number = output.shape[1] - dropped
        if (side := isqrt(number)) ** 2 == number:
            return output[:, dropped:].transpose(1, 2).unflatten(2, (side, side))
    return None
