"""From teacher settings to a loaded teacher, its layers paired with the student's, and the frozen projectors that go with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.config.schema import FeatureConfig, RunConfig, TeacherConfig
from kd_accel.data.datamodule import Data, view_transform
from kd_accel.data.hashing import hashed_order
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UserError
from kd_accel.io.hashing import settings_digest, tensors_digest
from kd_accel.models.cpu_kernels import use_cpu_kernels
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor, compile_with_hooks, probe_layers
from kd_accel.models.fusion import fuse_conv_bn
from kd_accel.models.memory_format import image_memory_format
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector, PcaFit, Projectors, Shape, build_projectors
from kd_accel.models.weights import load_run_model, load_weights
from kd_accel.teacher.teacher import LiveTeacher

_PCA_BATCH_SAMPLES = 128
_PCA_SAMPLES = 31


@dataclass(frozen=True)
class TeacherNetwork:
    """A loaded teacher and what it was trained with. label_names: None where its weights do not say."""

    model: nn.Module
    arch: str
    stem: str
    arch_args: dict[str, Any]
    mean: list[float]
    std: list[float]
    label_names: tuple[str, ...] | None
    _fused: dict[tuple[str, ...], nn.Module | None] = field(default_factory=dict, repr=False, compare=False)

    def fuse_conv_bn(self, layers: Mapping[str, str], *, image_size: int) -> nn.Module | None:
        """With BatchNorm inside the convolutions, None where that cannot be. layers: {...: teacher's layer} that are recorded."""
        names = tuple(sorted(layers.values()))
        if names not in self._fused:
            self._fused[names] = fuse_conv_bn(self.model, layers=names, image_size=image_size)
        return self._fused[names]

    def fingerprint_fields(self) -> dict[str, Any]:
        """What decides its answers: weights and buffers, architecture, normalization."""
        weights = tensors_digest(self.model.state_dict())
        shared = {"arch": self.arch, "stem": self.stem, "arch_args": self.arch_args}
        return {"weights": weights, **shared, "mean": self.mean, "std": self.std}

    @property
    def digest(self) -> str:
        return settings_digest(self.fingerprint_fields())


@dataclass(frozen=True)
class LayerPairs:
    """Layers of a student and a teacher that are compared. teacher: {student layer: teacher layer}. shapes: of the teacher's layers.

    projectors: what the direction needs on both sides, by the student's layer; the PCA's are not fitted yet.
    """

    teacher: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    projectors: Projectors = field(default_factory=Projectors)

    def pca_channels(self) -> dict[str, int]:
        """Width of each frozen projector, by the teacher's layer. Raises UserError where one layer would need two."""
        widths: dict[str, int] = {}
        for layer, channels in self.projectors.pca_channels.items():
            name = self.teacher[layer]
            if widths.setdefault(name, channels) != channels:
                raise UserError(
                    f"teacher.layers: {name} is paired with layers of {widths[name]} and of {channels} channels; a PCA has one "
                    "width: use direction student_to_teacher, or other layers"
                )
        return widths


@dataclass(frozen=True)
class FrozenProjectors:
    """Fitted PCA projectors by the teacher's layer, and the share of the teacher's variance that each keeps."""

    modules: dict[str, FeatureProjector] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def by_student_layer(self, pairs: Mapping[str, str]) -> dict[str, FeatureProjector]:
        return {layer: self.modules[name] for layer, name in pairs.items() if name in self.modules}

    def to(self, device: torch.device) -> FrozenProjectors:
        for module in self.modules.values():
            module.to(device)
        return self


def load_teacher(config: TeacherConfig, data: Data) -> TeacherNetwork:
    """Raises UserError for a teacher that does not fit its own weights, or the classes of the data."""
    if config.run is not None:
        model, card = load_run_model(Path(config.run), field="teacher")
        names = tuple(card.label_names)
        teacher = TeacherNetwork(model, card.arch, card.stem, card.arch_args, card.mean, card.std, names)
    else:
        assert config.arch and config.weights and config.mean and config.std, "checked by checks.problems"
        model = build_model(
            config.arch,
            num_classes=len(data.label_names),
            stem=config.stem,
            arch_args=config.arch_args,
            field="teacher",
        )
        load_weights(model, config.weights, arch=config.arch, is_exact=True, field="teacher")
        teacher = TeacherNetwork(model, config.arch, config.stem, config.arch_args, config.mean, config.std, None)
    _refuse_other_classes(teacher, data, config)
    return teacher


def pair_layers(config: RunConfig, network: nn.Module, teacher: nn.Module) -> LayerPairs:
    """The layers that the feature term compares, none without one, and the projectors between them."""
    feature = config.distill.feature if config.distill else None
    if feature is None:
        return LayerPairs()
    assert config.teacher is not None
    pairs = dict(zip(feature.layers, config.teacher.layers or feature.layers, strict=True))
    size = config.data.image_size
    shapes = probe_layers(teacher, list(pairs.values()), image_size=size, field="teacher.layers")
    projectors = build_projectors(
        probe_layers(network, feature.layers, image_size=size),
        {layer: shapes[name] for layer, name in pairs.items()},
        direction=feature.direction,
        seed=config.seed,
    )
    return LayerPairs(pairs, shapes, projectors)


def ready_teacher(
    config: RunConfig, teacher: TeacherNetwork, accelerator: Accelerator, *, layers: Mapping[str, str]
) -> tuple[nn.Module, Normalize]:
    """(model, normalization) as it answers: a copy on the device, in the memory layout of the config, BatchNorm folded."""
    memory_format = image_memory_format(config.train.channels_last, accelerator.device)
    own = teacher.fuse_conv_bn(layers, image_size=config.data.image_size) or copy.deepcopy(teacher.model)
    use_cpu_kernels(own, accelerator.device)
    model = own.to(accelerator.device).to(memory_format=memory_format)
    return model, Normalize(teacher.mean, teacher.std, memory_format=memory_format).to(accelerator.device)


def live_teacher(
    config: RunConfig,
    model: nn.Module,
    normalize: nn.Module,
    accelerator: Accelerator,
    *,
    layers: Mapping[str, str],
    projectors: Mapping[str, nn.Module],
) -> LiveTeacher:
    """It answers in the numeric mode of the config. layers: {name in the signals: teacher's layer}; projectors by the former."""
    outputs = LiveTeacher(model, normalize, layers=layers, projectors=projectors, autocast=accelerator.autocast)
    if config.train.compile:
        compile_with_hooks(model)
    return outputs


def numeric_mode(config: RunConfig, teacher: TeacherNetwork, layers: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """How the teacher computes: part of a cache's identity. Without `tf32` it was full float32, as it always is on a CPU."""
    train = config.train
    is_fused = teacher.fuse_conv_bn(layers, image_size=config.data.image_size) is not None
    is_last = image_memory_format(train.channels_last, device) == torch.channels_last
    switches = {"precision": train.precision, "channels_last": is_last, "compile": train.compile}
    if device.type == "cuda" and train.tf32:
        switches["tf32"] = True
    return {**switches, "batchnorm": "folded" if is_fused else "apart"}


def fit_projectors(
    config: RunConfig,
    data: Data,
    model: nn.Module,
    normalize: nn.Module,
    channels: Mapping[str, int],
    accelerator: Accelerator,
) -> FrozenProjectors:
    """A PCA for each teacher layer in `channels`, fitted on the main process whatever the number of processes."""
    feature = config.distill.feature if config.distill else None
    if feature is None or not channels:
        return FrozenProjectors()

    def fit() -> dict[str, tuple[FeatureProjector, float]]:
        fits: dict[str, PcaFit] = {}
        for recorded in _sampled_features(config, data, feature, model, normalize, list(channels), accelerator):
            for layer, values in recorded.items():
                fits.setdefault(layer, PcaFit(values.shape[1])).update(values)
        return {layer: fits[layer].finish(width, layer=layer) for layer, width in channels.items()}

    fitted = on_main_process(accelerator, fit)
    modules = {layer: projector for layer, (projector, _) in fitted.items()}
    explained = {layer: share for layer, (_, share) in fitted.items()}
    notices = [f"PCA at {layer} explains {share:.1%} of the variance" for layer, share in explained.items()]
    if feature.pca_images > len(data.splits.train):
        notices.append(
            f"distill.feature.pca_images: {feature.pca_images} is more than the {len(data.splits.train)} training samples; the PCA "
            "is fitted on all of them"
        )
    return FrozenProjectors(modules, explained, tuple(notices))


def projectors_from(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FeatureProjector]:
    """Frozen projectors from their saved tensors, by layer."""
    projectors = {}
    for layer, named in tensors.items():
        channels_out, channels_in = named["conv.weight"].shape[:2]
        projectors[layer] = FeatureProjector(channels_in, channels_out).requires_grad_(False)
        projectors[layer].load_state_dict(named)
    return projectors


def _sampled_features(
    config: RunConfig,
    data: Data,
    feature: FeatureConfig,
    model: nn.Module,
    normalize: nn.Module,
    layers: list[str],
    accelerator: Accelerator,
) -> Iterator[dict[str, Tensor]]:
    """The raw teacher features of `pca_images` training samples, drawn from all of them, view 0, in the order of the samples."""
    views = view_transform(config.data)
    samples = np.sort(hashed_order((_PCA_SAMPLES,), data.splits.train)[: feature.pca_images])
    model.eval()
    with FeatureExtractor(model, layers) as recorder, torch.no_grad(), accelerator.autocast():
        for part in np.array_split(samples, -(-len(samples) // _PCA_BATCH_SAMPLES)):
            pixels = torch.from_numpy(views(data.train.pixels(part), part, 0)).permute(0, 3, 1, 2)
            model(normalize(pixels.to(accelerator.device)))
            yield recorder.take()


def _refuse_other_classes(teacher: TeacherNetwork, data: Data, config: TeacherConfig) -> None:
    if teacher.label_names is None or teacher.label_names == data.label_names:
        return
    if len(teacher.label_names) != len(data.label_names):
        raise UserError(
            f"teacher.run: {config.run} knows {len(teacher.label_names)} classes, the data has {len(data.label_names)}; "
            "use a teacher that was trained on these classes"
        )
    pairs = zip(teacher.label_names, data.label_names, strict=True)
    index, (theirs, ours) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"teacher.run: class {index} of {config.run} is {theirs!r}, but {ours!r} in the data; both need the same classes in "
        "the same order"
    )
