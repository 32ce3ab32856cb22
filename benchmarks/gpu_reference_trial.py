"""Images for the trial of gpu_reference: noise in ten classes, each around a color of its own."""

from __future__ import annotations

import numpy as np

_CLASSES = 10
_SAMPLES = {"train": 40, "test": 20}


def images(split: str, image_size: int) -> dict[str, object]:
    """Return a split in the form that `data.source=import:...` expects."""
    labels = np.arange(_SAMPLES[split]) % _CLASSES
    colors = np.random.default_rng(0).integers(0, 200, (_CLASSES, 1, 1, 3))
    noise = np.random.default_rng(len(labels)).integers(0, 56, (len(labels), image_size, image_size, 3))
    return {
        "images": (colors[labels] + noise).astype(np.uint8),
        "labels": labels.tolist(),
        "label_names": [str(label) for label in range(_CLASSES)],
    }
