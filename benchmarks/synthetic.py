"""Synthetic images and small networks with fault injection, for trainings with `import:benchmarks.synthetic:NAME`.

Faults are set by environment variables, so that the config is the same with and without a fault:
    KD_FAULT_SIGTERM_AT  step number: the last rank sends itself SIGTERM in the forward of this training step
    KD_FAULT_NAN_AT      `logits:5` or `gradient:5`: the logits, or only their gradient, are NaN in training step 5
"""

from __future__ import annotations

import os
import signal

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 10
SAMPLES = {"train": 2048, "test": 256}
NAN_POSITION = 2
"""Position in the batch of the sample whose logits are NaN."""


def images(split: str, image_size: int) -> dict[str, object]:
    """Return a split of images with one color per class and noise, in the format of `data.source`; deterministic."""
    return _images(SAMPLES[split], image_size, seed=len(split))


def many_images(split: str, image_size: int) -> dict[str, object]:
    """Return four times as many of these images."""
    return _images(4 * SAMPLES[split], image_size, seed=len(split))


def _images(samples: int, image_size: int, *, seed: int) -> dict[str, object]:
    generator = np.random.default_rng(seed)
    labels = np.arange(samples) % CLASSES
    colors = np.random.default_rng(0).integers(0, 200, (CLASSES, 1, 1, 3), dtype=np.uint8)
    noise = generator.integers(0, 56, (len(labels), image_size, image_size, 3), dtype=np.uint8)
    return {"images": colors[labels] + noise, "labels": labels.tolist(), "label_names": [str(name) for name in range(CLASSES)]}


class SmallNet(nn.Module):
    """Network of two convolutions and a classifier, without BatchNorm, whose statistics depend on the split of a batch."""

    def __init__(self, num_classes: int, *, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, stride=4, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=4, padding=1), nn.ReLU())
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer2(self.layer1(images.to(self.fc.weight.dtype)))
        return self.fc(maps.mean((2, 3)))


class FaultyNet(SmallNet):
    """Network whose training steps have the faults that the environment sets."""

    steps = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if not self.training:
            return logits
        self.steps += 1
        _send_signal(self.steps)
        return _inject_nan(logits, self.steps)


def student(num_classes: int) -> nn.Module:
    """Build a student without faults."""
    return SmallNet(num_classes, width=8)


def faulty_student(num_classes: int) -> nn.Module:
    """Build a student with the faults that the environment sets."""
    return FaultyNet(num_classes, width=8)


def faulty_student_float64(num_classes: int) -> nn.Module:
    """Build a float64 student with the faults that the environment sets."""
    return FaultyNet(num_classes, width=8).double()


def teacher(num_classes: int) -> nn.Module:
    """Build a teacher."""
    return SmallNet(num_classes, width=16)


def teacher_float64(num_classes: int) -> nn.Module:
    """Build a float64 teacher."""
    return SmallNet(num_classes, width=16).double()


def _send_signal(step: int) -> None:
    is_last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if is_last_rank and os.environ.get("KD_FAULT_SIGTERM_AT") == str(step):
        os.kill(os.getpid(), signal.SIGTERM)


def _inject_nan(logits: Tensor, step: int) -> Tensor:
    match os.environ.get("KD_FAULT_NAN_AT", ":").split(":"):
        case ["logits", at] if at == str(step):
            return logits.index_fill(0, torch.tensor([NAN_POSITION], device=logits.device), torch.nan)
        case ["gradient", at] if at == str(step):
            # The square root is 0 at 0, and its derivative is infinite: finite logits with a NaN gradient.
            return logits + (0 * logits).sum().sqrt()
    return logits
