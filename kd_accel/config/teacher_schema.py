"""Settings of the teacher and of its stored outputs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kd_accel.config.distill_schema import Schedule
from kd_accel.config.section import Argument, Section

Stem = Literal["imagenet", "no_pool", "cifar"]
StorageType = Literal["float32", "float16", "bfloat16", "int8"]
TeacherInterpolation = Literal["bilinear", "bicubic"]


class CacheConfig(Section):
    """The stored outputs of the teacher.

    Args:
        dir: Directory of the cache; a cache is identified by its contents, not by its path.
        dtype: Storage type; int8 for features only (logits are float16 then); null = float16 for a new cache.
        shard_mib: Size of the largest tensor's files in a new cache, in MiB.
        batch_size: Samples per forward of the teacher in a new cache; null = train.batch_size / train.grad_accum_steps.
    """

    dir: str | None = None
    dtype: StorageType | None = None
    shard_mib: float = 64.0
    batch_size: int | None = None


class TeacherConfig(Section):
    """The teacher: a finished run, an architecture with weights, or, with neither, the stored outputs of a cache alone.

    Args:
        run: Run directory of the teacher; excludes arch, stem, weights, arch_args, mean and std.
        arch: Architecture, as model.arch.
        stem: First layers of a ResNet, as model.stem.
        weights: Weights, as model.weights; they must fit exactly, the classifier included.
        arch_args: Arguments of the builder, as model.arch_args.
        mean: Per-channel mean in 0..1 with which the teacher was trained; null = that of the weights' run or library.
        std: Per-channel standard deviation in 0..1 with which the teacher was trained; null = as mean.
        image_size: Side of the images that the teacher sees, in pixels, to which each view is resized; null = that of the
            teacher's run, of arch_args, or of the card of its pretrained weights, else data.image_size.
        interpolation: Interpolation of that resizing; null = that of the weights' card, bicubic for a run, else bilinear.
        crop_pct: Side of the central square that the teacher sees, as a fraction of the side of the view; null = 1, the
            complete view, because data.transform and data.crop_pct have cropped it already.
        class_map: Class of the teacher for each class of the data: auto = the class of the same name; a list of indices or
            names in the order of the data; {data class: teacher's index or name}, the others by name; null = the same classes.
        min_accuracy: Smallest accuracy of the teacher on the test samples, a fraction, with which a training or a build starts;
            auto = two standard errors above the share of the largest class; null = no check.
        outputs: Source of the outputs: live = computed for each batch; cached = read from the files of `kd-accel cache build`,
            also without run and arch; mixed = logits from the files, features live.
        cache: The stored outputs.
    """

    run: str | None = None
    arch: str | None = None
    stem: Stem = "imagenet"
    weights: str | None = None
    arch_args: dict[str, Argument] = Field(default_factory=dict)
    mean: list[float] | None = None
    std: list[float] | None = None
    image_size: int | None = None
    interpolation: TeacherInterpolation | None = None
    crop_pct: float | None = None
    class_map: Literal["auto"] | list[int | str] | dict[str, int | str] | None = None
    min_accuracy: float | Literal["auto"] | None = "auto"
    outputs: Literal["live", "cached", "mixed"] = "live"
    cache: CacheConfig = Field(default_factory=CacheConfig)

    @property
    def is_stored(self) -> bool:
        """True if no teacher is set that could run, so that its outputs can only be read from a cache."""
        return self.run is None and self.arch is None

    @property
    def uses_cache(self) -> bool:
        """True if outputs are read from a cache."""
        return self.outputs != "live" and self.cache.dir is not None


class MemberConfig(TeacherConfig):
    """One of several teachers: the settings of a teacher, and its weight.

    Args:
        weight: Weight of the teacher in the mean of all teachers; the weights are divided by their sum.
    """

    weight: float | Schedule = 1.0
