"""Folders of small pictures of two classes, dark cats and light dogs."""

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")


def write_photos(folder, *, train, test=16):
    """Write `train` training images and `test` test images of each class below a folder."""
    generator = np.random.default_rng(0)
    for split, number in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            write_images(folder / split / name, number, brightness=100 * label, generator=generator)


def write_images(folder, number, *, brightness=100, generator=None):
    """Write images of 24x24 random pixels, in `brightness` and the 99 levels above."""
    generator = generator or np.random.default_rng(1)
    folder.mkdir(parents=True)
    for image in range(number):
        pixels = generator.integers(brightness, brightness + 100, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{image:02}.png")
