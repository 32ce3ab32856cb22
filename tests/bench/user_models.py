"""Models of a user for `import:tests.bench.user_models:...`: with a known duration, interrupted, for one image size."""

import time

from torch import nn

WARM_UP = 21
"""Forwards of a measurement without a minimum time before the timed ones: the first, and twenty of the warm-up."""


class Interrupted(nn.Module):
    """Module whose forward is interrupted at a given call; 0 = never."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, images):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return images


class _Sleep(nn.Module):
    """Layer that takes a millisecond per image."""

    def forward(self, images):
        time.sleep(0.001 * len(images))
        return images


def sleeper(num_classes):
    return nn.Sequential(_Sleep(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def interrupted(num_classes):
    """Build a model that is interrupted in its eighth timed forward."""
    return nn.Sequential(Interrupted(WARM_UP + 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def for_8x8(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
