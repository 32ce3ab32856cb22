"""PIL pictures with torchvision's transforms for each of them, one item after the other, as most trainings have them."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from benchmarks.jobs import IMAGE_SIZE, MEAN, STD, Bench


def transform() -> v2.Compose:
    """Build the transform of a picture: crop, flip, normalized float."""
    return v2.Compose(
        [
            v2.RandomCrop(IMAGE_SIZE, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def pictures_of(bench: Bench) -> tuple[list[Image.Image], list[int]]:
    """Return the images of a bench as pictures, with their labels."""
    return [Image.fromarray(image) for image in bench.images.pixels(bench.samples)], bench.images.labels[bench.samples].tolist()


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures in memory, transformed at each access."""

    def __init__(self, bench: Bench) -> None:
        self._pictures, self._labels = pictures_of(bench)
        self._transform = transform()

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._pictures[index]), self._labels[index]
