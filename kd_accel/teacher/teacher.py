"""The teacher: a trained classifier with what it was trained with, and its forward for batches of a training.

It stays outside the trained module, so that it is in no checkpoint and no DDP broadcast touches its buffers. The forward uses
`no_grad` and not `inference_mode`: tensors of the latter cannot enter a loss together with trained parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.io.hashing import settings_digest, tensors_digest
from kd_accel.losses.targets import Identity, TargetFunction
from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.models.inference import CpuKernels, fuse_conv_bn, image_memory_format, use_cpu_kernels
from kd_accel.models.preprocess import Normalize
from kd_accel.types import Batch, TeacherOutput


@dataclass(frozen=True)
class Teacher:
    """A trained classifier.

    Args:
        network: the plain network, normalized images [B, 3, H, W] -> logits [B, C].
        mean: per-channel mean in 0..1 that it was trained with.
        std: per-channel standard deviation in 0..1 that it was trained with.
        class_names: in the order of the logits; None where they are not known.
        arch: name of the architecture, part of the fingerprint; None for a network that was built elsewhere.
        stem: stem of a ResNet, part of the fingerprint.
        arch_args: further arguments of the architecture's builder, part of the fingerprint.
    """

    network: nn.Module
    mean: list[float]
    std: list[float]
    class_names: tuple[str, ...] | None = None
    arch: str | None = None
    stem: str = "imagenet"
    arch_args: dict[str, Any] = field(default_factory=dict)
    _fused: dict[tuple[str, ...], nn.Module | None] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raise ValueError unless mean and std are three numbers each, and std is positive."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or (name == "std" and min(values) <= 0):
                raise ValueError(f"{name}: {values} must be three {'positive ' * (name == 'std')}numbers, one for each channel")

    @classmethod
    def from_run(cls, run: str | Path) -> Teacher:
        """Load the model of a finished run. Raises ValueError (`UserError`) if the directory holds none, or a damaged one."""
        from kd_accel.teacher.loading import load_run_teacher  # which imports this module

        return load_run_teacher(Path(run))

    @torch.no_grad()
    def __call__(self, images: Tensor, *, layers: Iterable[str] = ()) -> TeacherOutput:
        """Compute the output for images, in the network's own precision.

        Args:
            images: uint8 [B, 3, H, W], on the device of the network.
            layers: layers whose maps [B, D, H, W] are recorded.

        Raises:
            TypeError: `images` is not such a tensor; normalized images would be normalized twice.
            UserError: A layer is not found.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: must be a uint8 tensor [B, 3, H, W], not {kind}")
        self.network.eval()
        normalize = Normalize(self.mean, self.std).to(images.device)
        with FeatureExtractor(self.network, list(layers)) as extractor:
            logits = self.network(normalize(images))
            return TeacherOutput(logits.float(), extractor.take())

    def fused(self, layers: Iterable[str], *, image_size: int) -> nn.Module | None:
        """Return a copy with BatchNorm fused into the convolutions, None where that would change a recorded layer."""
        names = tuple(sorted(layers))
        if names not in self._fused:
            self._fused[names] = fuse_conv_bn(self.network, layers=names, image_size=image_size)
        return self._fused[names]

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return all that decides the outputs: a digest of weights and buffers, architecture, normalization."""
        weights = tensors_digest(self.network.state_dict())
        shared = {"arch": self.arch, "stem": self.stem, "arch_args": self.arch_args}
        return {"weights": weights, **shared, "mean": self.mean, "std": self.std}

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
        """Copy the network for inference: BatchNorm fused, kernels and memory format of the device.

        Args:
            device: where the copy runs.
            layers: layers that will be recorded; they must keep their values.
            image_size: side of the images in pixels.
            channels_last: memory format; None = on GPUs.
            cpu_kernels: auto, always or never, as `use_cpu_kernels` has it.

        Returns:
            The copy, and the normalization in front of it.
        """
        memory_format = image_memory_format(channels_last, device)
        network = copy.deepcopy(self.fused(layers, image_size=image_size) or self.network)
        use_cpu_kernels(network, device, cpu_kernels)
        network = network.to(device).to(memory_format=memory_format)
        return network, Normalize(self.mean, self.std, memory_format=memory_format).to(device)

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
        """Return how the teacher computes on a device, part of a cache's fingerprint.

        Without the key `tf32` it computes in full float32, as always on a CPU.
        """
        is_fused = self.fused(layers, image_size=image_size) is not None
        is_last = image_memory_format(channels_last, device) == torch.channels_last
        switches = {"precision": precision, "channels_last": is_last, "compile": compiled}
        if device.type == "cuda" and tf32:
            switches["tf32"] = True
        if cpu_kernels != "auto":
            switches["cpu_kernels"] = cpu_kernels
        return {**switches, "conv_bn": "fused" if is_fused else "separate"}


class LiveTeacher:
    """The forward of a teacher for batches on its device, with the targets of the recorded layers.

    Args:
        network: the teacher's network; put in evaluation mode and locked.
        normalize: uint8 images -> input of the network.
        targets: target function of each recorded layer, by the teacher's layer name; fitted, on the device.
        autocast: the context in which the teacher runs; a cached teacher must have been built in the same.

    `close` must be called at the end: hooks record the layers until then.
    """

    def __init__(
        self,
        network: nn.Module,
        normalize: nn.Module,
        *,
        targets: Mapping[str, TargetFunction] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.network, self.normalize, self.autocast = network, normalize, autocast
        self.targets = dict(targets or {})
        for module in (network, normalize, *self.targets.values()):
            module.eval().requires_grad_(False)
        self._extractor = FeatureExtractor(network, list(self.targets))
        self._extractor.open()
        self._locked = self.digest()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Compute logits and targets for uint8 images [B, 3, H, W] on the teacher's device."""
        if self.network.training:  # a caller has switched it with train()
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
        """Check our own invariant: a training must not have changed the teacher."""
        assert self.digest() == self._locked, "the teacher's weights or buffers changed during the training"

    def close(self) -> None:
        """Remove the hooks from the network."""
        self._extractor.close()


def raw_targets(layers: Iterable[str]) -> dict[str, TargetFunction]:
    """Return the identity for each layer."""
    return {layer: Identity() for layer in layers}
