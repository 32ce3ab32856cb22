"""Public interface of the cache: build a cache, open it by its directory, read outputs by sample and view."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kd_accel.cache.build_spec import CacheBuild
from kd_accel.cache.compatibility import (
    check_headers,
    check_samples,
    covered_samples,
    create_request,
    data_fields,
    differing_fields,
)
from kd_accel.cache.manifest import read_manifest, read_samples, read_spec
from kd_accel.cache.reader import CachedTeacher, OpenCache
from kd_accel.cache.spec import LOGITS, SPLITS
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
        """Run the teacher once over all samples and views, and store its outputs.

        A directory that holds a part of the same cache is completed: only what is missing or damaged is computed. In a launch
        of several processes every process must call this; each does a share of the work.

        Args:
            directory: Directory of the cache; created if it does not exist.
            teacher: The teacher.
            views: Images, splits and views; held-out splits are stored without augmentation.
            layers: Target functions by the teacher's layer, fitted in place; or names of layers whose raw maps are stored.
            dtype: Storage type; int8 for features only (logits are float16 then).
            batch_size: Samples in one forward of the teacher, on each process.
            shard_mib: Size of the largest tensor's files, in MiB.
            channels_last: Memory format of the teacher's maps; None = channels_last on GPUs.
            compiled: Whether the teacher is compiled with torch.compile.
            accelerator: The processes; its mixed precision is that of the teacher. None = those of the launch.

        Raises:
            ValueError: An argument is not valid.
            UserError: The directory holds another cache, another build is running, or the disk refuses.
        """
        data = views.module if isinstance(views, ViewDataset) else views
        num_views = _checked_views(teacher, data, batch_size, shard_mib)
        accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
        targets = dict(layers) if isinstance(layers, Mapping) else raw_targets(layers)
        image_size = data.transform.image_size
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
        directory = Path(directory)
        with locked_for_building(directory, accelerator):
            network, normalize = teacher.on_device(
                accelerator.device, layers=targets, image_size=image_size, channels_last=channels_last
            )
            parts = (directory, request, data, network, normalize, accelerator)
            build_cache(CacheBuild(*parts, batch_samples=batch_size, shard_mib=shard_mib, is_compiled=compiled))
        return cls.open(directory)

    @classmethod
    def open(cls, directory: str | Path, teacher: Teacher | None = None) -> TeacherCache:
        """Open a complete cache by its directory.

        Args:
            directory: Directory of the cache.
            teacher: A teacher that must be the one of the cache; None = not checked.

        Raises:
            UserError: The cache is incomplete or damaged, or belongs to another teacher.
        """
        directory = Path(directory)
        cache_spec = read_spec(directory)
        if teacher is not None:
            fields = {**cache_spec.fingerprint_fields, "teacher": teacher.fingerprint_fields()}
            _refuse(directory, "the outputs of another teacher", differing_fields(cache_spec, fields))
        samples, files = read_samples(directory, cache_spec), read_manifest(directory, cache_spec)
        check_headers(directory, cache_spec, files, splits=SPLITS, views=cache_spec.views, tensors=tuple(cache_spec.tensors))
        layers = tuple(name for name in cache_spec.tensors if name != LOGITS)
        return cls(OpenCache(directory, cache_spec, samples, layers))

    def views(self, data: ImageDataset) -> ViewDataset:
        """Return the views that the cache was built from.

        Args:
            data: The images; they may be fewer than those of the cache.

        Raises:
            UserError: The samples, their contents, the classes or the image size are not those of the cache.
        """
        stored = self._cache.cache_spec.fingerprint_fields["views"]
        transform = ViewTransform(
            augment=stored["transform"],
            image_size=data.module.transform.image_size,
            crop_padding=stored.get("crop_padding", 0),
        )
        views = ViewDataset(data, transform, num_views=self.num_views, view_seed=stored.get("view_seed", 0))
        self.check_data(views.module)
        return views

    def check_data(self, data: DataModule) -> None:
        """Check that the cache was built from these images and views. Raises UserError that names what differs."""
        spec = self._cache.cache_spec
        _refuse(self.directory, "other data", differing_fields(spec, {**spec.fingerprint_fields, **data_fields(data)}))
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
            view: Number of the view; a tensor, as a DataLoader collates it, must have one value only.
            split: Split of the samples; features are stored for the training split only.
            device: Device of the result; None = CPU.

        Returns:
            float32 logits [n, C], and features [n, D, H, W] by the teacher's layer.

        Raises:
            ValueError: The cache does not cover a sample or the view.
            UserError: A file is missing or damaged.
        """
        indices = index.cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
        number, num_views = _single_view(view), self.num_views if split == "train" else 1
        if not 0 <= number < num_views:
            raise ValueError(f"view: {number} is not stored; the {split} split has the views 0 to {num_views - 1}")
        if split not in self._sources:
            self._sources[split] = self._cache.source(split)
        if not self._sources[split].covers(indices):
            raise ValueError(f"index: the cache does not cover all of these samples in the {split} split")
        return self._sources[split].read(indices, number, torch.device(device or "cpu"))

    def verify(self) -> None:
        """Check every byte of the cache.

        Raises:
            UserError: Files are missing or damaged; the message has their names.
        """
        wrong = find_damaged_files(self.directory, self._cache.cache_spec)
        if wrong:
            listed = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
            raise UserError(f"{self.directory}: {len(wrong)} files are damaged ({listed}); build the cache again to repair it")


def _checked_views(teacher: Teacher, data: DataModule, batch_size: int, shard_mib: float) -> int:
    """Return the number of views. Raises ValueError for arguments of a build that do not fit together."""
    if data.num_views is None:
        raise ValueError("views: num_views must be a number; new views in each epoch cannot be stored")
    if batch_size < 1 or shard_mib <= 0:
        raise ValueError(f"batch_size and shard_mib must be positive, not {batch_size} and {shard_mib}")
    if teacher.class_names is not None and teacher.class_names != tuple(data.label_names):
        raise ValueError("teacher: its class_names must be those of views, in the same order")
    return data.num_views


def _single_view(view: int | Tensor) -> int:
    numbers = sorted(set(torch.as_tensor(view).flatten().tolist()))
    if len(numbers) != 1:
        raise ValueError(f"view: all samples of a read must have the same view, not {numbers}")
    return int(numbers[0])


def _precision(accelerator: Accelerator) -> Precision:
    names: dict[str, Precision] = {"no": "float32", "bf16": "bf16", "fp16": "fp16"}
    if accelerator.mixed_precision not in names:
        raise ValueError(f"accelerator: mixed precision {accelerator.mixed_precision} is not supported; use no, bf16 or fp16")
    return names[accelerator.mixed_precision]


def _refuse(directory: Path, holds: str, different: Sequence[str]) -> None:
    if different:
        raise UserError(
            f"{directory}: holds {holds}: {'; '.join(different)}; open another cache, or build one in another directory"
        )
