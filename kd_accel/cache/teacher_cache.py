"""Python interface of the cache: build a cache, open it by its directory, read outputs by sample and view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.cache.build_spec import CacheBuild
from kd_accel.cache.compatibility import (
    check_headers,
    check_samples,
    covered_samples,
    create_request,
    data_fields,
)
from kd_accel.cache.differences import differing_fields
from kd_accel.cache.manifest import read_manifest, read_samples
from kd_accel.cache.reader import CachedTeacher, OpenCache
from kd_accel.cache.spec import LOGITS, VIEWED_SPLITS
from kd_accel.cache.stored_teacher import StoredTeacher
from kd_accel.cache.verify import find_damaged_files
from kd_accel.cache.writer import build_cache, locked_for_building
from kd_accel.config.schema import Precision, StorageType
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import Split
from kd_accel.data.transforms import ViewTransform
from kd_accel.data.views import ImageDataset, ViewDataset
from kd_accel.distributed import Accelerator
from kd_accel.errors import UserError
from kd_accel.losses.targets import TargetFunction
from kd_accel.models.feature_extractor import probe_logits
from kd_accel.models.projectors import Shape
from kd_accel.teacher.teacher import Teacher, raw_targets
from kd_accel.types import TeacherOutput


class TeacherCache:
    """Stored outputs of a teacher: logits, and features mapped by target functions, for every sample and view.

    Create one with `build` or `open`.

    Attributes:
        directory: Directory of the cache.
        shapes: Shape (D, H, W) of the stored features by the teacher's layer.
        num_views: Number of views of the training split; held-out splits have one, without augmentation.
        fingerprint: Digest of all that decides the stored values.
    """

    def __init__(self, cache: OpenCache) -> None:
        spec = cache.cache_spec
        self._cache = cache
        self._sources: dict[Split, CachedTeacher] = {}
        self.directory, self.num_views, self.fingerprint = cache.directory, spec.views, spec.fingerprint
        self.shapes: dict[str, Shape] = {layer: cast(Shape, spec.tensors[layer].shape) for layer in cache.layers}

    @classmethod
    def build(  # noqa: PLR0913  (everything that decides the stored values)
        cls,
        directory: str | Path,
        teacher: Teacher,
        views: ViewDataset | DataModule,
        *,
        layers: Mapping[str, TargetFunction] | Sequence[str] = (),
        dtype: StorageType = "float16",
        batch_size: int = 256,
        shard_mib: float = 64.0,
        channels_last: bool | None = None,
        compiled: bool = False,
        accelerator: Accelerator | None = None,
    ) -> TeacherCache:
        """Run the teacher once over all samples and views, store its outputs, and open the cache.

        A directory that holds a part of the same cache is completed: only missing and damaged files are computed, after a
        comparison of a few stored logits with those of the teacher now. Every process of a launch must call this method.

        Args:
            directory: Directory of the cache; created if it does not exist.
            teacher: The teacher.
            views: Images, splits and views; held-out splits are stored without augmentation.
            layers: Target functions by the teacher's layer, fitted in place; or names of layers, to store their raw maps.
            dtype: Storage type; int8 for features only (logits are float16 then).
            batch_size: Samples in one forward of the teacher, on each process.
            shard_mib: Size of the largest tensor's files, in MiB.
            channels_last: Memory format of the teacher's maps; None = channels_last on GPUs.
            compiled: Whether the teacher is compiled with torch.compile.
            accelerator: The launch's `Accelerator`, whose mixed precision the teacher uses; None = a new one.

        Raises:
            ValueError: If an argument is not valid.
            UserError: If the directory holds another cache, the teacher has another number of classes than the data, another
                build is running, or a file cannot be written.
        """
        data = views.module if isinstance(views, ViewDataset) else views
        num_views, teacher = _checked_views(data, batch_size, shard_mib), teacher.for_classes(data.label_names)
        accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        targets = dict(layers) if isinstance(layers, Mapping) else raw_targets(layers)
        request = create_request(
            teacher,
            data,
            targets,
            device=accelerator.device,
            views=num_views,
            dtype=dtype,
            precision=_precision(accelerator),
            channels_last=channels_last,
            compiled=compiled,
            tf32=torch.backends.cudnn.allow_tf32,
        )
        directory, image_size = Path(directory), data.transform.image_size
        placed: dict[str, Any] = {"layers": targets, "image_size": image_size, "channels_last": channels_last}
        with locked_for_building(directory, accelerator):
            network, normalize = teacher.on_device(accelerator.device, **placed)
            _refuse_other_logits(network, len(data.label_names), image_size=normalize.output_size(image_size))
            parts = (directory, request, data, network, normalize, accelerator)
            build_cache(CacheBuild(*parts, batch_samples=batch_size, shard_mib=shard_mib, is_compiled=compiled))
        return cls.open(directory)

    @classmethod
    def open(cls, directory: str | Path, teacher: Teacher | None = None) -> TeacherCache:
        """Open a complete cache by its directory.

        Args:
            directory: Directory of the cache.
            teacher: Teacher whose outputs the cache must hold, by weights, preprocessing and classes; None = not checked. Code
                that computes other outputs from equal weights is found by `build` alone.

        Returns:
            The cache, with headers and lengths of all files checked. Contents are checked when they are read.

        Raises:
            UserError: If the cache is incomplete or damaged, or belongs to another teacher.
        """
        directory = Path(directory)
        cache_spec = StoredTeacher.read(directory).cache_spec
        if teacher is not None:
            stored = cache_spec.fingerprint_fields
            present = teacher.for_classes(stored["data"]["label_names"]).for_images(stored["views"]["image_size"])
            different = differing_fields(stored, {**stored, "teacher": present.fingerprint_fields()})
            _refuse(directory, "the outputs of another teacher", different)
        samples, files = read_samples(directory, cache_spec), read_manifest(directory, cache_spec)
        names, splits = tuple(cache_spec.tensors), cache_spec.samples
        check_headers(directory, cache_spec, files, splits=splits, views=cache_spec.views, tensors=names)
        layers = tuple(name for name in cache_spec.tensors if name != LOGITS)
        return cls(OpenCache(directory, cache_spec, samples, layers))

    def views(self, data: ImageDataset) -> ViewDataset:
        """Return the views from which the cache was built.

        Args:
            data: Images; a subset of the samples of the cache is enough, unless its views are mixed.

        Returns:
            Views of `data` with the augmentation and the seed of the cache.

        Raises:
            UserError: If the samples, their contents, the classes or the image size differ from those of the cache.
        """
        stored = self._cache.cache_spec.fingerprint_fields["views"]
        transform = ViewTransform.from_fingerprint({**stored, "image_size": data.module.transform.image_size})
        views = ViewDataset(data, transform, num_views=self.num_views, view_seed=stored.get("view_seed", 0))
        self.check_data(views.module)
        return views

    def check_data(self, data: DataModule) -> None:
        """Check that the cache was built from these images and views.

        Raises:
            UserError: If images or views differ from those of the cache. The message lists the differences.
        """
        stored = self._cache.cache_spec.fingerprint_fields
        different = differing_fields(stored, {**stored, **data_fields(data)})
        _refuse(self.directory, "the outputs for other data or views", different)
        for split, samples in covered_samples(data).items():
            check_samples(self.directory, split, self._cache.samples[split], samples)

    def read(
        self,
        index: Tensor | np.ndarray,
        view: int | Tensor,
        *,
        split: Split = "train",
        device: torch.device | str | None = None,
    ) -> TeacherOutput:
        """Read the teacher's outputs for samples of one view.

        Args:
            index: Indices of the samples in their source split, int64 [n].
            view: Number of the view, or a tensor of equal numbers as a DataLoader collates them.
            split: Split of the samples; features are stored for train and unlabeled only.
            device: Device of the result; None = CPU.

        Returns:
            Logits [n, C], and features [n, D, H, W] by the teacher's layer, both float32.

        Raises:
            ValueError: If the cache does not cover the split, a sample or the view.
            UserError: If a file is missing or damaged.
        """
        if split not in self._cache.samples:
            raise ValueError(f"split: {split!r} is not in the cache; use one of {', '.join(self._cache.samples)}")
        indices = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        number, num_views = _single_view(view), self.num_views if split in VIEWED_SPLITS else 1
        if not 0 <= number < num_views:
            stored = "only view 0" if num_views == 1 else f"views 0 to {num_views - 1}"
            raise ValueError(f"view: {number} is not in the cache; the {split} split has {stored}")
        if split not in self._sources:
            self._sources[split] = self._cache.source(split)
        if not self._sources[split].covers(indices):
            raise ValueError(f"index: the cache does not cover all of these samples in the {split} split")
        return self._sources[split].read(indices, number, torch.device(device or "cpu"))

    def verify(self) -> None:
        """Check every byte of the cache.

        Raises:
            UserError: If files are missing or damaged. The message lists them.
        """
        wrong = find_damaged_files(self.directory, self._cache.cache_spec)
        if wrong:
            listed = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
            raise UserError(
                f"{self.directory}: missing or damaged files ({len(wrong)}): {listed}; call TeacherCache.build with the same "
                "arguments, which writes only these files"
            )


def _refuse_other_logits(network: nn.Module, num_classes: int, *, image_size: int) -> None:
    """Raise UserError if a teacher has another number of logits than the data has classes."""
    remedy = "set class_map of the teacher, which selects the logit of each class of the data"
    probe_logits(network, num_classes=num_classes, image_size=image_size, field="teacher", remedy=remedy)


def _checked_views(data: DataModule, batch_size: int, shard_mib: float) -> int:
    """Return the number of views. Raises ValueError if arguments of a build are not valid."""
    if data.num_views is None:
        raise ValueError("views: num_views is None (new views in each epoch), which cannot be stored; set a number of views")
    if batch_size < 1 or shard_mib <= 0:
        raise ValueError(f"batch_size and shard_mib must be positive, got {batch_size} and {shard_mib}")
    return data.num_views


def _single_view(view: int | Tensor) -> int:
    numbers = sorted(set(torch.as_tensor(view).flatten().tolist()))
    if len(numbers) != 1:
        raise ValueError(f"view: all samples of a read must have the same view, got {numbers}")
    return int(numbers[0])


def _precision(accelerator: Accelerator) -> Precision:
    names: dict[str, Precision] = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}
    if accelerator.mixed_precision not in names:
        raise ValueError(f"accelerator: mixed precision {accelerator.mixed_precision} is not supported; use no, bf16 or fp16")
    return names[accelerator.mixed_precision]


def _refuse(directory: Path, holds: str, different: Sequence[str]) -> None:
    if different:
        raise UserError(
            f"{directory}: holds {holds}: {'; '.join(different)}. Open another cache, or build one in another directory"
        )
