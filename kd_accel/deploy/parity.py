"""Parity of an exported model with its network in PyTorch: equal logits within a tolerance, and equal classes.

In: images, and the two functions from images to logits. Out: the largest difference, and whether the export is refused.

Shapes: B batch, C classes, N samples, R runs over all samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""Function from images [B, 3, S, S] to logits [B, C]."""

BATCH_SIZES = (1, 7)
"""Sizes of the batches in which all samples pass through an export; the last batch of 7 is smaller, unless 7 divides N."""
TOLERANCE = 1e-3
"""Largest difference of the logits, as a fraction of their range over all samples and classes."""


@dataclass(frozen=True)
class Parity:
    """Comparison of the logits of an export with those of its network.

    Attributes:
        samples: Number of samples.
        largest_difference: Largest absolute difference of two logits; NaN if a logit is not finite.
        logit_range: Largest minus smallest logit of the network.
        other_classes: Number of predicted classes that differ although the network's best two logits are further apart than
            twice the largest difference allowed.
    """

    samples: int
    largest_difference: float
    logit_range: float
    other_classes: int

    @property
    def allowed(self) -> float:
        """Largest difference that is allowed."""
        return TOLERANCE * self.logit_range

    @property
    def holds(self) -> bool:
        """True if the export computes the function of the network."""
        return self.largest_difference <= self.allowed and not self.other_classes

    def __str__(self) -> str:
        """Return the figures as a part of a sentence."""
        ratio = self.largest_difference / self.logit_range if self.logit_range else float(self.largest_difference > 0)
        return (
            f"largest difference of the logits {self.largest_difference:.2g}, {ratio:.2g} of their range (at most "
            f"{TOLERANCE:g}), and {self.other_classes} other classes where the margin of the best two logits exceeds "
            f"{2 * self.allowed:.2g}"
        )


def measure_parity(network: Forward, exported: Forward, images: Tensor) -> Parity:
    """Run both functions on the same images, the export once for each of `BATCH_SIZES`, and compare their logits.

    Args:
        network: The network in PyTorch, in evaluation mode.
        exported: The export, loaded from its file.
        images: Input of both, [N, 3, S, S].
    """
    expected = _logits(network, images, max(BATCH_SIZES))
    return compare(expected, [_logits(exported, images, batch_size) for batch_size in BATCH_SIZES])


def compare(expected: Tensor, runs: list[Tensor]) -> Parity:
    """Compare the logits of an export with those of its network.

    Args:
        expected: Logits of the network, [N, C].
        runs: Logits of the export, [N, C] each. Another shape counts as an infinite difference.
    """
    logit_range = float(expected.max() - expected.min())
    if any(logits.shape != expected.shape for logits in runs):
        return Parity(len(expected), float("inf"), logit_range, len(expected))
    logits_RNC, best = torch.stack(runs), expected.topk(min(2, expected.shape[1])).values
    is_clear = best[:, 0] - best[:, -1] > 2 * TOLERANCE * logit_range
    is_other = (logits_RNC.argmax(2) != expected.argmax(1)).any(0)
    return Parity(
        samples=len(expected),
        largest_difference=float((logits_RNC - expected).abs().max()),
        logit_range=logit_range,
        other_classes=int((is_clear & is_other).sum()),
    )


def _logits(forward: Forward, images: Tensor, batch_size: int) -> Tensor:
    """Return the logits of all images, float64 [N, C], computed in batches."""
    with torch.no_grad():
        return torch.cat([forward(batch).double() for batch in images.split(batch_size)])
