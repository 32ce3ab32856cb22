"""The teacher: a trained classifier with its normalization and classes, and its forward for the batches of a training.

The teacher stays outside the trained module, so no checkpoint contains it and no DDP broadcast changes its buffers. The forward
uses `no_grad`, because tensors of `inference_mode` cannot enter a loss together with trained parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from kd_accel.config.teacher_schema import TeacherInterpolation
from kd_accel.errors import UserError
from kd_accel.io.hashing import settings_digest, tensors_digest
from kd_accel.losses.targets import Identity, TargetFunction
from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.models.inference import CpuKernels, cast_for_autocast, fuse_conv_bn, image_memory_format, use_cpu_kernels
from kd_accel.models.preprocess import Normalize, Resize
from kd_accel.models.pretrained import WeightsInfo
from kd_accel.teacher.classes import ClassMap, resolve_class_map, resolve_indices
from kd_accel.types import Batch, TeacherOutput


@dataclass(frozen=True)
class Teacher:
    """Trained classifier with its normalization and classes.

    Args:
        network: Plain network, from normalized images [B, 3, H, W] to logits, one for each class of the teacher.
        mean: Channel means in 0..1 with which the network was trained.
        std: Channel standard deviations in 0..1 with which the network was trained.
        class_names: Class names in the order of the network's logits; None if unknown.
        arch: Name of the architecture, part of the fingerprint; None for a network that was built elsewhere.
        stem: Stem of a ResNet, part of the fingerprint.
        arch_args: Further arguments of the architecture's builder, part of the fingerprint.
        class_map: The teacher's class for each of the C classes of the data, for a teacher with more classes or another order:
            a list of indices or names, in the order of the data; `"auto"`, the class of the same name; or {class of the data:
            the teacher's index or name}, in which a class that is left out has the same name in both. The last two need the
            data's names, see `for_classes`. None = the same classes in the same order.
        image_size: Height and width to which images are resized for the network, in pixels; None = they keep their size.
        interpolation: Interpolation of that resizing, see `Resize`.
        crop_pct: Side of the central square that the network sees, as a fraction of the side of the images.
        info: Facts about the weights, for notices; None if unknown.

    Raises:
        ValueError: If `mean` or `std` has not three numbers, `std` is not positive, or another argument is not valid.
    """

    network: nn.Module
    mean: Sequence[float]
    std: Sequence[float]
    class_names: tuple[str, ...] | None = None
    arch: str | None = None
    stem: str = "imagenet"
    arch_args: dict[str, Any] = field(default_factory=dict)
    class_map: ClassMap | None = None
    image_size: int | None = None
    interpolation: TeacherInterpolation = "bilinear"
    crop_pct: float = 1.0
    info: WeightsInfo | None = field(default=None, repr=False, compare=False)
    _view_size: int | None = None
    _indices: tuple[int, ...] | None = None
    _is_resolved: bool = False
    _fused: dict[tuple[str, ...], nn.Module | None] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check mean, std and the class map, and convert sequences to lists, as a cache stores them. Raises ValueError."""
        for name in ("mean", "std", "arch_args"):
            object.__setattr__(self, name, _with_lists(getattr(self, name)))
        if isinstance(self.class_map, str) and self.class_map != "auto":
            raise ValueError(f"class_map: {self.class_map!r} must be 'auto', a list, a mapping or None")
        if self.class_map is not None and not len(self.class_map):
            raise ValueError(f"class_map: {self.class_map} must name at least one class")
        if not self._is_resolved and self.class_map is not None and not self._needs_names:
            object.__setattr__(self, "_indices", resolve_indices(list(self.class_map), self.class_names))
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ValueError(f"{name}: {values} must be three {'positive ' * (name == 'std')}numbers, one per channel")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size: {self.image_size} must be at least 1")
        if self.interpolation not in (modes := get_args(TeacherInterpolation)):
            raise ValueError(f"interpolation: {self.interpolation!r} must be one of {', '.join(modes)}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct: {self.crop_pct} must be above 0 and at most 1")

    @classmethod
    def from_run(cls, run: str | Path, *, class_map: ClassMap | None = None) -> Teacher:
        """Load the model of a finished run.

        Args:
            run: Run directory.
            class_map: As in `Teacher`.

        Raises:
            ValueError: If the directory has no intact model (`UserError`), or the class map is not valid.
        """
        from kd_accel.teacher.loading import load_run_teacher  # imported late: loading imports this module

        return load_run_teacher(Path(run), class_map=class_map)

    def for_classes(self, class_names: Sequence[str]) -> Teacher:
        """Return the teacher for the classes of the data, with logits in their order.

        Args:
            class_names: Class names of the data, by label.

        Returns:
            A teacher with the same network.

        Raises:
            ValueError: If the classes differ and `class_map` is None, or `class_map` does not give one class of the teacher for
                each class of the data (`UserError`).
        """
        try:
            indices = resolve_class_map(self.class_map, self.class_names, class_names)
        except UserError as error:
            raise UserError(f"teacher.{error}") from None
        return replace(self, _indices=indices, _is_resolved=True)

    def for_images(self, image_size: int) -> Teacher:
        """Return the teacher for images of one size, whose fingerprint has the resizing of these images, if any.

        Args:
            image_size: Height and width of the images of the data in pixels.

        Returns:
            A teacher with the same network.
        """
        return replace(self, _view_size=image_size)

    def resize_for(self, image_size: int) -> Resize | None:
        """Return the resizing of images of `image_size` pixels in height and width; None if they stay as they are."""
        resize = Resize(self.input_size(image_size), self.interpolation, self.crop_pct)
        return resize if resize.changes(image_size) else None

    def input_size(self, image_size: int) -> int:
        """Return height and width of what the network sees of images of `image_size` pixels in height and width."""
        return self.image_size or image_size

    @property
    def class_indices(self) -> tuple[int, ...] | None:
        """Index of the network's logit for each class of the data; None if the logits are used as they are.

        Raises:
            ValueError: If the class map needs the names of the data's classes.
        """
        if self._needs_names and not self._is_resolved:
            raise ValueError(
                f"class_map: {self.class_map} depends on the classes of the data; use teacher.for_classes(data.class_names)"
            )
        return self._indices

    @torch.no_grad()
    def __call__(self, images: Tensor, *, layers: Iterable[str] = ()) -> TeacherOutput:
        """Compute the output for images, in the network's own precision.

        Args:
            images: Images, uint8 [B, 3, H, W], or float32 in 0..255 as mixup makes them, on the device of the network.
            layers: Names of the layers whose maps [B, D, H, W] are recorded.

        Returns:
            Logits of the classes of the data, float32 [B, C], and the recorded maps by layer.

        Raises:
            TypeError: If `images` are not pixels of four dimensions: normalized images would be normalized twice.
            ValueError: If the class map needs the names of the data's classes, or an index is not that of a logit.
            UserError: If a layer is not found.
        """
        if not _are_pixels(images):
            kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"images: must be a uint8 tensor [B, 3, H, W], or float32 in 0..255 as mixup makes them, not {kind}; the "
                "teacher normalizes images itself"
            )
        self.network.eval()
        normalize = Normalize(self.mean, self.std, resize=self.resize_for(images.shape[-1])).to(images.device)
        with FeatureExtractor(self.network, list(layers)) as extractor:
            logits = _selection(self.class_indices, images.device)(self.network(normalize(images)))
            return TeacherOutput(logits.float(), extractor.take())

    def fused(self, layers: Iterable[str], *, image_size: int) -> nn.Module | None:
        """Return a copy of the network with BatchNorm fused into the convolutions; see `fuse_conv_bn`.

        Args:
            layers: Names of the layers that are recorded.
            image_size: Height and width of the images in pixels.

        Returns:
            The copy, the same object in each call with these layers while the weights are the same. None if the network cannot
            be fused, or if fusing would change a recorded layer.
        """
        names = tuple(sorted(layers))
        key = (tensors_digest(self.network.state_dict()), *names)
        for outdated in [own for own in self._fused if own[0] != key[0]]:
            del self._fused[outdated]
        if key not in self._fused:
            self._fused[key] = fuse_conv_bn(self.network, layers=names, image_size=self.input_size(image_size))
        return self._fused[key]

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what decides the outputs: a digest of weights and buffers, architecture, preprocessing, selected logits."""
        weights = tensors_digest(self.network.state_dict())
        shared = {"arch": self.arch, "stem": self.stem, "arch_args": self.arch_args}
        # Missing without a selection or a resizing, so that the caches of such teachers keep their fingerprint.
        selected = {} if self.class_indices is None else {"class_map": list(self.class_indices)}
        resize = None if self._view_size is None else self.resize_for(self._view_size)
        resized = {} if resize is None else resize.fingerprint_fields()
        return {"weights": weights, **shared, "mean": self.mean, "std": self.std, **resized, **selected}

    @property
    def fingerprint(self) -> str:
        """Digest of `fingerprint_fields`."""
        return settings_digest(self.fingerprint_fields())

    def on_device(
        self,
        device: torch.device,
        *,
        layers: Iterable[str] = (),
        image_size: int,
        channels_last: bool | None = None,
        cpu_kernels: CpuKernels = "auto",
    ) -> tuple[nn.Module, Normalize]:
        """Copy the network for inference: BatchNorm fused, kernels and memory format of the device, selected logits.

        Args:
            device: Device of the copy.
            layers: Names of the layers that will be recorded, whose values fusing must not change.
            image_size: Height and width of the images in pixels.
            channels_last: Whether maps are in the channels_last memory format; None = on GPUs only.
            cpu_kernels: Choice of kernels, as in `use_cpu_kernels`.

        Returns:
            (copy, preprocessing of its input: resizing if the network sees another size, and normalization), on the device.
        """
        memory_format = image_memory_format(channels_last, device)
        network = copy.deepcopy(self.fused(layers, image_size=image_size) or self.network)
        use_cpu_kernels(network, device, cpu_kernels)
        network = network.to(device).to(memory_format=memory_format)
        if self.class_indices is not None:
            select = _selection(self.class_indices, device)
            # A hook, so that modules and state dict keep their names, by which layers and weights are found.
            network.register_forward_hook(lambda module, inputs, logits: select(logits))
        resize = self.resize_for(image_size)
        return network, Normalize(self.mean, self.std, resize=resize, memory_format=memory_format).to(device)

    def numerics(
        self,
        device: torch.device,
        *,
        layers: Iterable[str],
        image_size: int,
        precision: str,
        channels_last: bool | None,
        compiled: bool,
        tf32: bool,
        cpu_kernels: CpuKernels = "auto",
    ) -> dict[str, Any]:
        """Describe the numerics of the teacher on a device, a part of a cache's fingerprint.

        Args:
            device: Device of the teacher.
            layers: Names of the layers that are recorded.
            image_size: Height and width of the images in pixels.
            precision: Precision of the forward: float32, bf16 or fp16.
            channels_last: Whether maps are in the channels_last memory format; None = on GPUs only.
            compiled: Whether the network is compiled.
            tf32: Whether TF32 is allowed on GPUs.
            cpu_kernels: Choice of kernels, as in `use_cpu_kernels`.

        Returns:
            Plain values. `tf32` is missing if TF32 is not used, as on any CPU; `cpu_kernels` is missing for auto.
        """
        is_fused = self.fused(layers, image_size=image_size) is not None
        is_last = image_memory_format(channels_last, device) == torch.channels_last
        switches = {"precision": precision, "channels_last": is_last, "compile": compiled}
        if device.type == "cuda" and tf32:
            switches["tf32"] = True
        if cpu_kernels != "auto":
            switches["cpu_kernels"] = cpu_kernels
        return {**switches, "conv_bn": "fused" if is_fused else "separate"}

    @property
    def _needs_names(self) -> bool:
        """True if the class map is given by the names of the data's classes."""
        return isinstance(self.class_map, str | Mapping)


class LiveTeacher:
    """Forward of a teacher for batches on its device, with the targets of the recorded layers.

    It is a `StagedTeacher` that has nothing to read. Hooks record the layers until `close` is called.

    Args:
        network: The teacher's network, which is set to evaluation mode and needs no gradients from then on. It is replaced by
            `models.inference.cast_for_autocast` if that returns a copy.
        normalize: Module that turns uint8 images [B, 3, H, W] into the input of the network.
        targets: Target functions of the recorded layers by the teacher's layer, fitted, on the device.
        autocast: Context in which the teacher runs. A cache holds the same outputs only if it was built in the same context.
        image_size: Height and width of the images in pixels; None = the network is not replaced.
    """

    def __init__(
        self,
        network: nn.Module,
        normalize: Normalize,
        *,
        targets: Mapping[str, TargetFunction] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        image_size: int | None = None,
    ) -> None:
        self.normalize, self.autocast = normalize, autocast
        self.targets = dict(targets or {})
        for module in (network, normalize, *self.targets.values()):
            module.eval().requires_grad_(False)
        size = None if image_size is None else normalize.output_size(image_size)
        cast = None if size is None else cast_for_autocast(network, image_size=size, autocast=autocast)
        self.network = cast or network
        self._extractor = FeatureExtractor(self.network, list(self.targets))
        self._extractor.open()
        self._locked = self.digest()

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Compute logits and targets for a batch on the teacher's device; see `finish`."""
        return self.finish(batch, ())

    def fetch(self, batch: Batch) -> tuple[()]:
        """Return nothing: the outputs are computed from the images of the batch alone."""
        return ()

    @torch.no_grad()
    def finish(self, batch: Batch, fetched: tuple[Tensor, ...]) -> TeacherOutput:
        """Compute logits and targets for a batch on the teacher's device.

        Args:
            batch: Batch of images [B, 3, H, W].
            fetched: Result of `fetch`.

        Returns:
            Logits, float32 [B, C], and targets [B, D, H, W] by the teacher's layer.
        """
        if self.network.training:  # a caller has called train()
            self.network.eval()
        with self.autocast():
            logits = self.network(self.normalize(batch.images))
            recorded = self._extractor.take()
            features = {layer: target(recorded[layer]) for layer, target in self.targets.items()}
        return TeacherOutput(logits.float(), features)

    def digest(self) -> str:
        """Compute the digest of weights and buffers."""
        return tensors_digest(self.network.state_dict())

    def check_unchanged(self) -> None:
        """Assert that weights and buffers are the same as at the start."""
        assert self.digest() == self._locked, "the teacher's weights or buffers changed during the training"

    def close(self) -> None:
        """Remove the hooks from the network."""
        self._extractor.close()


def _with_lists(value: Any) -> Any:
    """Return nested values with lists in place of tuples."""
    if isinstance(value, Mapping):
        return {name: _with_lists(own) for name, own in value.items()}
    return [_with_lists(own) for own in value] if isinstance(value, list | tuple) else value


def _are_pixels(images: object) -> bool:
    """Return whether images are pixels in 0..255, not fractions of 1 and not normalized, as far as their values show."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        return False
    return images.dtype == torch.uint8 or (images.dtype == torch.float32 and bool(images.amin() >= 0 and images.amax() > 1))


def _selection(indices: Sequence[int] | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function from the logits of the teacher's classes to those of the data's classes, [B, C]."""
    if indices is None:
        return lambda logits: logits
    last, index = max(indices), torch.tensor(indices, device=device)

    def select(logits: Tensor) -> Tensor:
        if logits.ndim != 2 or logits.shape[1] <= last:
            raise ValueError(f"class_map: index {last} is not found in the network's logits, which are {list(logits.shape)}")
        return logits.index_select(1, index)

    return select


def raw_targets(layers: Iterable[str]) -> dict[str, TargetFunction]:
    """Return the identity as target function of each layer."""
    return {layer: Identity() for layer in layers}
