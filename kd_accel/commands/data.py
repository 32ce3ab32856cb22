"""From data settings to images, rows and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kd_accel.config import DataConfig, RunConfig
from kd_accel.data.cuts import Rows, channel_statistics, cut_rows
from kd_accel.data.loader import EvalLoader, TrainLoader, load_batches
from kd_accel.data.sources import ImageSet, load_splits
from kd_accel.data.views import ViewFunction
from kd_accel.engine.evaluate import HeldOut
from kd_accel.engine.setup import Accelerator
from kd_accel.teacher.identity import rows_digest
from kd_accel.types import SignalSource

_COPIED_ROWS = 1024
_FEW_ROWS, _SMALL_IMAGE = 128, 32
HeldOutSplit = Literal["val", "test"]


@dataclass(frozen=True)
class Data:
    """Both splits, which rows of them are used for what, and the channel statistics that the trained model is given."""

    train: ImageSet
    test: ImageSet
    rows: Rows
    mean: list[float]
    std: list[float]

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.train.label_names


def data_identity(data: Data) -> dict[str, Any]:
    """By which a resumed run recognises its data, whatever its paths."""
    return {
        "label_names": list(data.label_names),
        "train_rows": len(data.rows.train),
        "val_rows": len(data.rows.val),
        "test_rows": len(data.rows.test),
        "digest": rows_digest(data.train, data.rows.train),
    }


def load_data(config: DataConfig) -> Data:
    """Read the source, cut the rows, measure mean and standard deviation unless the config gives them."""
    train, test = load_splits(config)
    rows = cut_rows(train.num_rows, test.num_rows, config)
    if config.mean is not None and config.std is not None:
        return Data(train, test, rows, config.mean, config.std)
    return Data(train, test, rows, *channel_statistics(train, rows.train))


def num_views(config: DataConfig) -> int | None:
    """Different views of each row; None = new ones each epoch."""
    return 1 if config.augment == "none" else config.views


def view_function(config: DataConfig) -> ViewFunction:
    return ViewFunction(
        augment=config.augment,
        image_size=config.image_size,
        crop_padding=config.crop_padding,
        view_seed=config.view_seed,
    )


def training_loader(data: Data, config: RunConfig, accelerator: Accelerator) -> TrainLoader:
    """Batches of this rank. Raises UserError where the rows do not fill one."""
    views = view_function(config.data)
    return TrainLoader(
        data.train,
        views,
        rows=data.rows.train,
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        grad_accum_steps=config.train.grad_accum_steps,
        seed=config.seed,
        views=num_views(config.data),
        num_workers=config.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def held_out(
    data: Data, config: RunConfig, accelerator: Accelerator, *, split: HeldOutSplit, signals: SignalSource | None
) -> HeldOut:
    """A held-out split with, where there is a teacher, what it says about it."""
    loader = EvalLoader(
        data.train if split == "val" else data.test,
        rows=data.rows.val if split == "val" else data.rows.test,
        batch_size=config.train.eval_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=config.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return HeldOut(loader, signals=signals)


def keep_images_on_gpu(loader: TrainLoader, data: Data, config: DataConfig, device: torch.device) -> None:
    """Keep the training images on a GPU where there is room for them and the views can be made there."""
    needed_bytes = len(data.rows.train) * 3 * config.image_size**2
    if device.type == "cuda" and view_function(config).has_device_form and fits_on_gpu(needed_bytes, device):
        loader.keep_images(images_on(device, data, num_workers=config.num_workers))


def notices_of_small_batches(config: RunConfig, device: torch.device, *, processes: int) -> list[str]:
    """Return a notice where each GPU gets few small images in a forward, whose launches take longer than its work."""
    rows = config.train.batch_size // (processes * config.train.grad_accum_steps)
    if device.type != "cuda" or rows >= _FEW_ROWS or config.data.image_size > _SMALL_IMAGE:
        return []
    return [
        f"train.batch_size: {config.train.batch_size} over {processes} processes x {config.train.grad_accum_steps} "
        f"accumulation steps is {rows} images of {config.data.image_size} pixels in a forward, which a GPU computes faster "
        f"than they can be launched; use {_FEW_ROWS} or more for each process (and scale optim.lr), or fewer processes"
    ]


def fits_on_gpu(needed_bytes: int, device: torch.device) -> bool:
    """Return whether so much takes at most half of the memory that is free on a GPU now; the rest is for the training."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return 2 * needed_bytes <= free_bytes


def images_on(device: torch.device, data: Data, *, num_workers: int) -> torch.Tensor:
    """Return the training images in the order of their rows, decoded by workers: uint8 [N, 3, S, S], channels_last."""
    rows, size = data.rows.train, data.train.pixels(data.rows.train[:1]).shape[1]
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    shares = [(rows[start : start + _COPIED_ROWS], 0) for start in range(0, len(rows), _COPIED_ROWS)]
    workers = 0 if data.train.is_in_memory else num_workers
    for index, batch in enumerate(load_batches(data.train, None, shares, num_workers=workers)):
        images[index * _COPIED_ROWS :][: len(batch.rows)] = batch.images.to(device)
    return images
