"""Settings of the data as a frozen pydantic model, and the base of all groups of settings.

The "Args:" of a class is the `--help` of its settings.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

MAX_IMAGE_SIZE = 4096

Augment = Literal["none", "crop", "crop_flip", "resized_crop", "trivial_augment"]


class Section(BaseModel):
    """A group of settings: frozen, strictly typed (`true` is not a number, `1.5` is not an integer), without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataConfig(Section):
    """Images, splits and views.

    Args:
        source: Data set: hub:NAME[@revision], parquet:DIR, imagefolder:DIR, digits, or import:package.module:function.
        image_column: Column of the images (hub, parquet).
        label_column: Column of the labels (hub, parquet).
        train_split: Name of the split to train on.
        test_split: Name of the held-out split.
        image_size: Side of the square to which every image is resized, in pixels.
        augment: Random transform that turns an image into a view.
        crop_padding: Zero padding before a random crop, in pixels (crop, crop_flip, trivial_augment).
        views: Number of different views of each sample, used in turn (view = epoch mod views); null = new views each epoch.
        view_seed: Seed of the views, independent of the run's seed, so that runs of any seed see the same views.
        val_fraction: Fraction of the training samples held out for validation; the choice depends on their number alone.
        limit_train: Number of training samples to use (validation shrinks in proportion); null = all.
        limit_test: Number of test samples to use; null = all.
        mean: Per-channel mean in 0..1; null = measured on the training samples.
        std: Per-channel standard deviation in 0..1; null = measured on the training samples.
        memory_limit_mib: Size up to which a decoded data set is held in memory, in MiB; workers decode larger ones.
        num_workers: Number of worker processes that prepare batches; 0 = in the training process.
    """

    source: str = "digits"
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    image_size: int = 32
    augment: Augment = "crop"
    crop_padding: int = 4
    views: int | None = None
    view_seed: int = 0
    val_fraction: float = 0.1
    limit_train: int | None = None
    limit_test: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    memory_limit_mib: int = 4096
    num_workers: int = 0
