"""Images and small networks, named as `import:benchmarks.acceptance.own:...` by the trainings of the acceptance.

Disturbances are set in the environment, so that the settings are those of the undisturbed training:
    KD_ACCEPTANCE_SIGTERM_AT  the last rank sends itself SIGTERM in the forward of this training step
    KD_ACCEPTANCE_BREAKS      `logits:5` or `gradient:5`: NaN in the forward, or in the gradient behind it, of training step 5
"""

from __future__ import annotations

import os
import signal

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 10
SAMPLES = {"train": 2048, "test": 256}
BROKEN_PLACE = 2
"""Position in the batch of the sample that `logits` breaks."""


def images(split: str, image_size: int) -> dict[str, object]:
    """Return noise around a color per class, as `data.source` expects it, the same at every call."""
    return _images(SAMPLES[split], image_size, seed=len(split))


def many_images(split: str, image_size: int) -> dict[str, object]:
    """Return more of the same."""
    return _images(4 * SAMPLES[split], image_size, seed=len(split))


def _images(samples: int, image_size: int, *, seed: int) -> dict[str, object]:
    generator = np.random.default_rng(seed)
    labels = np.arange(samples) % CLASSES
    colors = np.random.default_rng(0).integers(0, 200, (CLASSES, 1, 1, 3), dtype=np.uint8)
    noise = generator.integers(0, 56, (len(labels), image_size, image_size, 3), dtype=np.uint8)
    return {"images": colors[labels] + noise, "labels": labels.tolist(), "label_names": [str(name) for name in range(CLASSES)]}


class SmallNet(nn.Module):
    """Network of two convolutions and a classifier, without BatchNorm: results do not depend on how a batch is shared."""

    def __init__(self, num_classes: int, *, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, stride=4, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=4, padding=1), nn.ReLU())
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer2(self.layer1(images.to(self.fc.weight.dtype)))
        return self.fc(maps.mean((2, 3)))


class DisturbedNet(SmallNet):
    """The same network with disturbed training steps, as set in the environment."""

    steps = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if not self.training:
            return logits
        self.steps += 1
        _send_signal(self.steps)
        return _broken(logits, self.steps)


def student(num_classes: int) -> nn.Module:
    """Build a student."""
    return SmallNet(num_classes, width=8)


def disturbed(num_classes: int) -> nn.Module:
    """Build a student whose training is disturbed."""
    return DisturbedNet(num_classes, width=8)


def disturbed_float64(num_classes: int) -> nn.Module:
    """Build the same in float64."""
    return DisturbedNet(num_classes, width=8).double()


def teacher(num_classes: int) -> nn.Module:
    """Build a teacher."""
    return SmallNet(num_classes, width=16)


def teacher_float64(num_classes: int) -> nn.Module:
    """Build the same in float64."""
    return SmallNet(num_classes, width=16).double()


def _send_signal(step: int) -> None:
    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if is_last_rank and os.environ.get("KD_ACCEPTANCE_SIGTERM_AT") == str(step):
        os.kill(os.getpid(), signal.SIGTERM)


def _broken(logits: Tensor, step: int) -> Tensor:
    match os.environ.get("KD_ACCEPTANCE_BREAKS", ":").split(":"):
        case ["logits", at] if at == str(step):
            return logits.index_fill(0, torch.tensor([BROKEN_PLACE], device=logits.device), torch.nan)
        case ["gradient", at] if at == str(step):
            return logits + (0 * logits).sum().sqrt()  # its derivative at 0 is infinite, its value is not
    return logits
