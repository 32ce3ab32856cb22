"""From data settings to images, samples and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kd_accel.config.schema import DataConfig, RunConfig
from kd_accel.data.dataset import samples_digest
from kd_accel.data.loader import TrainLoader, load_batches
from kd_accel.data.sources import ImageSet, load_splits
from kd_accel.data.splits import SplitSamples, channel_statistics, split_samples
from kd_accel.data.transforms import ViewTransform
from kd_accel.distributed import Accelerator

_COPIED_SAMPLES = 1024
_FEW_SAMPLES, _SMALL_IMAGE = 128, 32


@dataclass(frozen=True)
class Data:
    """Both splits, which samples of them are used for what, and the channel statistics that the trained model is given."""

    train: ImageSet
    test: ImageSet
    splits: SplitSamples
    mean: list[float]
    std: list[float]

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.train.label_names


def data_fingerprint(data: Data) -> dict[str, Any]:
    """By which a resumed run recognizes its data, whatever its paths."""
    return {
        "label_names": list(data.label_names),
        "train_samples": len(data.splits.train),
        "val_samples": len(data.splits.val),
        "test_samples": len(data.splits.test),
        "digest": samples_digest(data.train, data.splits.train),
    }


def load_data(config: DataConfig) -> Data:
    """Read the source, cut the samples, measure mean and standard deviation unless the config gives them."""
    train, test = load_splits(config)
    samples = split_samples(train.num_samples, test.num_samples, config)
    if config.mean is not None and config.std is not None:
        return Data(train, test, samples, config.mean, config.std)
    return Data(train, test, samples, *channel_statistics(train, samples.train))


def num_views(config: DataConfig) -> int | None:
    """Different views of each sample; None = new ones each epoch."""
    return 1 if config.augment == "none" else config.views


def view_transform(config: DataConfig) -> ViewTransform:
    return ViewTransform(
        augment=config.augment,
        image_size=config.image_size,
        crop_padding=config.crop_padding,
        view_seed=config.view_seed,
    )


def training_loader(data: Data, config: RunConfig, accelerator: Accelerator) -> TrainLoader:
    """Batches of this rank. Raises UserError where the samples do not fill one."""
    views = view_transform(config.data)
    return TrainLoader(
        data.train,
        views,
        samples=data.splits.train,
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        grad_accum_steps=config.train.grad_accum_steps,
        seed=config.seed,
        views=num_views(config.data),
        num_workers=config.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def keep_images_on_gpu(loader: TrainLoader, data: Data, config: DataConfig, device: torch.device) -> None:
    """Keep the training images on a GPU where there is room for them and the views can be made there."""
    needed_bytes = len(data.splits.train) * 3 * config.image_size**2
    if device.type == "cuda" and view_transform(config).supports_device and fits_on_gpu(needed_bytes, device):
        loader.keep_images(images_on(device, data, num_workers=config.num_workers))


def notices_of_small_batches(config: RunConfig, device: torch.device, *, processes: int) -> list[str]:
    """Return a notice where each GPU gets few small images in a forward, whose launches take longer than its work."""
    samples = config.train.batch_size // (processes * config.train.grad_accum_steps)
    if device.type != "cuda" or samples >= _FEW_SAMPLES or config.data.image_size > _SMALL_IMAGE:
        return []
    return [
        f"train.batch_size: {config.train.batch_size} over {processes} processes x {config.train.grad_accum_steps} "
        f"accumulation steps is {samples} images of {config.data.image_size} pixels in a forward, which a GPU computes faster "
        f"than they can be launched; use {_FEW_SAMPLES} or more for each process (and scale optim.lr), or fewer processes"
    ]


def fits_on_gpu(needed_bytes: int, device: torch.device) -> bool:
    """Return whether so much takes at most half of the memory that is free on a GPU now; the rest is for the training."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return 2 * needed_bytes <= free_bytes


def images_on(device: torch.device, data: Data, *, num_workers: int) -> torch.Tensor:
    """Return the training images in the order of their samples, decoded by workers: uint8 [N, 3, S, S], channels_last."""
    samples, size = data.splits.train, data.train.pixels(data.splits.train[:1]).shape[1]
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    shares = [(samples[start : start + _COPIED_SAMPLES], 0) for start in range(0, len(samples), _COPIED_SAMPLES)]
    workers = 0 if data.train.is_in_memory else num_workers
    for index, batch in enumerate(load_batches(data.train, None, shares, num_workers=workers)):
        images[index * _COPIED_SAMPLES :][: len(batch.samples)] = batch.images.to(device)
    return images
