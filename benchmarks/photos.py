"""Cases of `benchmarks.input --size`: JPEG photos decoded, cut at random, resized and mirrored by two worker processes.

    loader/WxH      the loader of kd_accel, from an image folder
    v2_tensor/WxH   torchvision's JPEG decoder and transforms.v2 on tensors, and a DataLoader
    v2_pil/WxH      Pillow and transforms.v2 on PIL images, and a DataLoader

The photos are parts of scikit-learn's two sample photos, enlarged. Batches are uint8; the result is images/s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data

PHOTO_SIZES = ((500, 375), (4000, 3000))
WORKERS = 2
_FILES = 16
"""Number of different files of each size; further samples are links to them."""


def photo_cases(directory: Path, *, image_size: int, batch_size: int, steps: int) -> dict[str, Callable[[], float]]:
    """Return the cases.

    Args:
        directory: Empty directory for the photos.
        image_size: Side of the decoded images, in pixels.
        batch_size: Samples in a batch.
        steps: Batches in a block; photos of 4000x3000 pixels have a quarter of them.
    """
    cases: dict[str, Callable[[], float]] = {}
    for width, height in PHOTO_SIZES:
        name = f"{width}x{height}"
        blocks = steps if width < 1000 else max(1, steps // 4)  # noqa: PLR2004
        folder = _write_photos(directory / name, (width, height), batch_size * blocks)
        cases[f"loader/{name}"] = _loader(folder, image_size, batch_size)
        for kind, load in (("v2_tensor", _TensorPhotos), ("v2_pil", _PilPhotos)):
            cases[f"{kind}/{name}"] = _common_loader(load(sorted((folder / "train/photos").iterdir()), image_size), batch_size)
    return cases


def _write_photos(folder: Path, size: tuple[int, int], count: int) -> Path:
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    files: list[Path] = []
    for split, number in (("train", count), ("test", 1)):
        directory = folder / split / "photos"
        directory.mkdir(parents=True)
        for index in range(number):
            path = directory / f"{index:05}.jpg"
            if len(files) < _FILES:
                left = 10 * (len(files) // 2)
                part = photos[len(files) % 2].crop((left, 0, left + 560, 420))
                part.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
                files.append(path)
            else:
                path.hardlink_to(files[index % _FILES])
    return folder


def _loader(folder: Path, image_size: int, batch_size: int) -> Callable[[], float]:
    config = DataConfig(
        source=f"imagefolder:{folder}",
        image_size=image_size,
        transform="resized_crop_flip",
        val_fraction=0.0,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        num_workers=WORKERS,
    )
    loader, epochs = load_data(config).train_loader(batch_size=batch_size), itertools.count()

    def block() -> float:
        return float(sum(len(batch.images) for step in loader.epoch(next(epochs)) for batch in step))

    return block


def _common_loader(dataset: Dataset[Tensor], batch_size: int) -> Callable[[], float]:
    loader = DataLoader(
        dataset, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: float(sum(map(len, loader)))


class _TensorPhotos(Dataset[Tensor]):
    """Photos, decoded to tensors."""

    def __init__(self, files: list[Path], image_size: int) -> None:
        self._files = files
        self._transform = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        content = read_file(str(self._files[index]))
        image: Tensor = self._transform(decode_jpeg(content, mode=ImageReadMode.RGB))
        return image


class _PilPhotos(Dataset[Tensor]):
    """Photos, decoded to PIL images."""

    def __init__(self, files: list[Path], image_size: int) -> None:
        self._files = files
        crop_flip = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
        self._transform = v2.Compose([*crop_flip, v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._files[index]) as file:
            image: Tensor = self._transform(file.convert("RGB"))
        return image
