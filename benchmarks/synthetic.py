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
    """Network whose training steps have the faults that the environment sets.

    The steps are counted on the host for the signal, which a CUDA graph would not repeat, and on the device for NaN.
    """

    steps = 0
    steps_on_device: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if not self.training:
            return logits
        self.steps += 1
        _send_signal(self.steps)
        if self.steps_on_device is None:
            self.steps_on_device = torch.zeros((), dtype=torch.int64, device=logits.device)
        self.steps_on_device += 1
        return _inject_nan(logits, self.steps_on_device)


class WaitingNet(SmallNet):
    """Network that reads a value back from the device in its forward."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * float(logits.isfinite().all().item())


class CapturingNet(SmallNet):
    """Network that waits for its stream, which no debug mode of PyTorch notices, and which fails within a capture."""

    def forward(self, images: Tensor) -> Tensor:
        if images.is_cuda:
            torch.cuda.current_stream(images.device).synchronize()
        return super().forward(images)


class DropoutNet(SmallNet):
    """Network with dropout."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(images), 0.5, self.training)


def student(num_classes: int) -> nn.Module:
    """Build a student without faults."""
    return SmallNet(num_classes, width=8)


def student_with_dropout(num_classes: int) -> nn.Module:
    """Build a student with dropout."""
    return DropoutNet(num_classes, width=8)


def waiting_student(num_classes: int) -> nn.Module:
    """Build a student that waits for the device in each forward."""
    return WaitingNet(num_classes, width=8)


def capturing_student(num_classes: int) -> nn.Module:
    """Build a student that cannot be captured as a CUDA graph."""
    return CapturingNet(num_classes, width=8)


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


def _inject_nan(logits: Tensor, step: Tensor) -> Tensor:
    kind, _, at = os.environ.get("KD_FAULT_NAN_AT", "").partition(":")
    if kind == "logits":
        rows = torch.arange(len(logits), device=logits.device)[:, None] == NAN_POSITION
        return torch.where(rows & (step == int(at)), torch.nan, logits)
    if kind == "gradient":
        # The square root is 0 at 0, and its derivative is infinite: finite logits with a NaN gradient.
        zero = (0 * logits).sum()
        return logits + 0 * torch.where(step == int(at), zero, zero + 1).sqrt()
    return logits
