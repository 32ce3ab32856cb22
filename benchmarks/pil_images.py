"""PIL images, each transformed by torchvision when it is read: the typical map-style data set."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from benchmarks.jobs import IMAGE_SIZE, MEAN, STD, Bench


def crop_flip_transform() -> v2.Compose:
    """Return the transform of a PIL image to a normalized float tensor [3, H, W], with random crop and flip."""
    return v2.Compose(
        [
            v2.RandomCrop(IMAGE_SIZE, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def pil_images(bench: Bench) -> tuple[list[Image.Image], list[int]]:
    """Return the images of a bench as PIL images, and their labels."""
    return [Image.fromarray(image) for image in bench.images.pixels(bench.samples)], bench.images.labels[bench.samples].tolist()


class PilImages(Dataset[tuple[Tensor, int]]):
    """PIL images in memory, transformed at each access."""

    def __init__(self, bench: Bench) -> None:
        self._images, self._labels = pil_images(bench)
        self._transform = crop_flip_transform()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._images[index]), self._labels[index]
