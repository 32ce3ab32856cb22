"""From data settings to images, rows and loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from kd_accel.config import DataConfig, RunConfig
from kd_accel.data.cuts import Rows, channel_statistics, cut_rows
from kd_accel.data.loader import EvalLoader, TrainLoader
from kd_accel.data.sources import ImageSet, load_splits
from kd_accel.data.views import ViewFunction
from kd_accel.engine.evaluate import HeldOut
from kd_accel.engine.setup import Accelerator
from kd_accel.teacher.identity import rows_digest
from kd_accel.types import SignalSource

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
    """Batches of this rank. On a GPU, a set in memory whose views can be made there is kept there."""
    views = view_function(config.data)
    on_device = accelerator.device.type == "cuda" and data.train.is_in_memory and views.has_device_form
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
        device_images=_stored_on_device(data, accelerator.device) if on_device else None,
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


def _stored_on_device(data: Data, device: torch.device) -> torch.Tensor:
    pixels = torch.from_numpy(data.train.pixels(data.rows.train))
    return pixels.permute(0, 3, 1, 2).to(device, memory_format=torch.channels_last)
