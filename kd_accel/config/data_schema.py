"""Settings of the data as a frozen pydantic model.

The "Args:" of a class is the `--help` of its settings.
"""

from __future__ import annotations

from typing import Literal

from kd_accel.config.section import Section
from kd_accel.config.transform_schema import Preset, TransformConfig, transform_config

MAX_IMAGE_SIZE = 4096

LabelRule = Literal["keep", "remap"]
OnError = Literal["stop", "skip"]
Background = Literal["black", "white"]
Sampling = Literal["uniform", "balanced"]


class DataConfig(Section):
    """Images, splits and views.

    Args:
        source: Data set: hub:NAME[@revision], hub:DIR, parquet:PATH, disk:DIR, imagefolder:DIR, csv:PATH, digits, or
            import:package.module:function.
        image_column: Column of the images (hub, parquet, disk), of their paths (csv), or key in an item (import).
        label_column: Column of the labels (hub, parquet, disk, csv, metadata.csv of an imagefolder), or key (import); null =
            no labels are read: training learns from the teacher alone, and its classes are the teacher's.
        labels: Classes of integer labels without names: keep (every integer from 0 to the largest) or remap (the integers that
            occur, ascending).
        train_split: Name of the split to train on.
        val_split: Name of the split to validate on; auto = a split named val, validation, valid or dev if the source has one,
            else, and with null, val_fraction of the training samples.
        test_split: Name of the held-out split.
        test_fraction: Fraction of the training split held out as the test split, for a source without one; null = test_split.
        unlabeled: Data set of more training images, written as source and read without labels: the student learns from the
            teacher alone on them; null = none.
        unlabeled_split: Name of the split of data.unlabeled to use; the default also stands for its only split.
        unlabeled_ratio: Number of unlabeled samples for each labeled one in an epoch, others in each epoch in turn; null = all
            in each epoch.
        sampling: Samples of an epoch: uniform = each once; balanced = as many of each class, drawn in each epoch.
        image_size: Side of the square to which every image is resized, in pixels.
        background: Color behind transparent pixels: black or white.
        pixel_range: Values [low, high] that become black and white in images of more than 8 bits per channel, linear between
            them; null = the range of the type, or an error if the type does not define it. 8-bit images are used as they are.
        crop_pct: Side of the central square that is used where nothing is random, as a fraction of the image's shorter side.
        transform: Random transforms that make a view: a preset, or settings by name, applied in their order.
        views: Number of different views of each sample, used in turn (view = epoch mod views); null = new views each epoch.
        view_seed: Seed of the views, independent of the run's seed, so that runs of any seed see the same views.
        val_fraction: Fraction of the training samples held out for validation, of each class; the choice depends on the
            labels of the training split alone.
        limit_train: Number of training samples to use (validation shrinks in proportion); null = all.
        limit_test: Number of test samples to use; null = all.
        mean: Per-channel mean in 0..1; null = measured on the training samples.
        std: Per-channel standard deviation in 0..1; null = measured on the training samples.
        memory_limit_mib: Size up to which a decoded data set is held in memory, in MiB; workers decode larger ones.
        num_workers: Number of worker processes that prepare batches; 0 = in the training process.
        on_error: What happens with an image that cannot be decoded: stop, or skip (it is left out of its split before the first
            step; `kd-accel data check` lists all of them).
    """

    source: str = "digits"
    image_column: str = "image"
    label_column: str | None = "label"
    labels: LabelRule = "keep"
    train_split: str = "train"
    val_split: str | None = "auto"
    test_split: str = "test"
    test_fraction: float | None = None
    unlabeled: str | None = None
    unlabeled_split: str = "train"
    unlabeled_ratio: float | None = None
    sampling: Sampling = "uniform"
    image_size: int = 32
    background: Background = "black"
    pixel_range: list[float] | None = None
    crop_pct: float = 1.0
    transform: Preset | TransformConfig = "crop"
    views: int | None = None
    view_seed: int = 0
    val_fraction: float = 0.1
    limit_train: int | None = None
    limit_test: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    memory_limit_mib: int = 4096
    num_workers: int = 0
    on_error: OnError = "stop"


def has_transform(data: DataConfig) -> bool:
    """Return whether views differ from their images."""
    return any(True for _ in transform_config(data.transform).items())
