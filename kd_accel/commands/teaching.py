"""From teacher settings to a teacher that answers, the projectors that go with it, and what is known of its accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.commands.data import Data, view_function
from kd_accel.commands.networks import memory_format
from kd_accel.config import FeatureConfig, RunConfig, TeacherConfig
from kd_accel.engine.checkpoint import Checkpoint
from kd_accel.engine.evaluate import HeldOut, teacher_accuracy
from kd_accel.engine.setup import Accelerator, on_main_process
from kd_accel.models.files import load_run_model, load_weights
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector, PcaFit, Projectors, build_projectors
from kd_accel.models.taps import TapRecorder, probe_taps
from kd_accel.models.zoo import build_model
from kd_accel.teacher.identity import rows_digest, settings_digest
from kd_accel.teacher.live import LiveTeacher, teacher_digest
from kd_accel.types import UserError

_PCA_BATCH_ROWS = 128


@dataclass(frozen=True)
class TeacherNetwork:
    """A loaded teacher and what it was trained with. label_names: None where its weights do not say."""

    model: nn.Module
    arch: str
    stem: str
    mean: list[float]
    std: list[float]
    label_names: tuple[str, ...] | None

    @property
    def digest(self) -> str:
        return teacher_digest(self.model, arch=self.arch, stem=self.stem, mean=self.mean, std=self.std)


@dataclass(frozen=True)
class Teaching:
    """A teacher ready to answer.

    frozen: its PCA projectors by tap, kept in every checkpoint. explained: the share of the teacher's variance that each keeps.
    """

    signals: LiveTeacher
    digest: str
    projectors: Projectors | None = None
    frozen: dict[str, FeatureProjector] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def load_teacher(config: TeacherConfig, data: Data) -> TeacherNetwork:
    """Raises UserError for a teacher that does not fit its own weights, or the classes of the data."""
    if config.run is not None:
        model, card = load_run_model(Path(config.run), field="teacher")
        teacher = TeacherNetwork(model, card.arch, card.stem, card.mean, card.std, tuple(card.label_names))
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
        teacher = TeacherNetwork(model, config.arch, config.stem, config.mean, config.std, None)
    _refuse_other_classes(teacher, data, config)
    return teacher


def build_teaching(
    config: RunConfig, data: Data, network: nn.Module, *, accelerator: Accelerator, checkpoint: Checkpoint | None
) -> Teaching:
    """Load the teacher, pair its taps with the student's, and fit (or take from the checkpoint) its frozen projectors."""
    assert config.teacher is not None
    teacher = load_teacher(config.teacher, data)
    digest = teacher.digest
    model = teacher.model.to(accelerator.device).to(memory_format=memory_format(config))
    normalize = Normalize(teacher.mean, teacher.std).to(accelerator.device)
    feature = config.distill.feature if config.distill else None
    if feature is None:
        return Teaching(_answering(config, model, normalize, {}, {}, accelerator), digest)
    pairs = dict(zip(feature.taps, config.teacher.taps or feature.taps, strict=True))
    projectors = _paired_projectors(config, feature, network, model, pairs)
    frozen, explained, notices = {}, {}, _warn_of_rectified_taps(feature, projectors)
    if checkpoint is not None:
        frozen, explained = _saved_projectors(checkpoint), checkpoint.state["pca_explained"]
    elif projectors.pca_channels:
        features = _first_features(config, data, feature, model, normalize, pairs, accelerator.autocast)
        fitted = on_main_process(accelerator, lambda: _fit_pca(features, projectors))
        frozen = {tap: projector for tap, (projector, _) in fitted.items()}
        explained = {tap: share for tap, (_, share) in fitted.items()}
        notices += [f"PCA at {tap} explains {share:.1%} of the variance" for tap, share in explained.items()]
    for projector in frozen.values():
        projector.to(accelerator.device)
    signals = _answering(config, model, normalize, pairs, frozen, accelerator)
    return Teaching(signals, digest, projectors, frozen, explained, notices)


def check_teacher_accuracy(config: RunConfig, data: Data, held_out: HeldOut, *, digest: str, accelerator: Accelerator) -> float:
    """The teacher's accuracy on the held-out rows, measured, or remembered from an earlier run beside this one."""
    rows = {"rows": rows_digest(data.test, data.rows.test), "teacher": digest, "precision": config.train.precision}
    path = config.directory.parent / ".teacher_accuracy" / f"{settings_digest(rows)}.json"
    remembered = on_main_process(accelerator, lambda: _remembered(path))
    if remembered is not None:
        return remembered
    accuracy = teacher_accuracy(held_out, accelerator=accelerator)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"accuracy": accuracy}), encoding="utf-8")
    return accuracy


def _remembered(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["accuracy"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answering(
    config: RunConfig,
    model: nn.Module,
    normalize: nn.Module,
    pairs: dict[str, str],
    frozen: dict[str, FeatureProjector],
    accelerator: Accelerator,
) -> LiveTeacher:
    signals = LiveTeacher(model, normalize, taps=pairs, projectors=frozen, autocast=accelerator.autocast)
    if config.train.compile:
        model.compile()
    return signals


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


def _paired_projectors(
    config: RunConfig, feature: FeatureConfig, network: nn.Module, teacher: nn.Module, pairs: dict[str, str]
) -> Projectors:
    size = config.data.image_size
    teacher_shapes = probe_taps(teacher, list(pairs.values()), image_size=size, field="teacher.taps")
    return build_projectors(
        probe_taps(network, feature.taps, image_size=size),
        {tap: teacher_shapes[name] for tap, name in pairs.items()},
        direction=feature.direction,
        teacher_projector=feature.teacher_projector,
        seed=config.seed,
    )


def _first_features(
    config: RunConfig,
    data: Data,
    feature: FeatureConfig,
    model: nn.Module,
    normalize: nn.Module,
    pairs: dict[str, str],
    autocast: Callable[[], AbstractContextManager],
) -> Iterator[dict[str, Tensor]]:
    """The raw teacher features of the first `pca_images` training rows, view 0, in the order of the rows."""
    views = view_function(config.data)
    rows = data.rows.train[: feature.pca_images]
    model.eval()
    with TapRecorder(model, list(pairs.values())) as recorder, torch.no_grad(), autocast():
        for part in np.array_split(rows, -(-len(rows) // _PCA_BATCH_ROWS)):
            pixels = torch.from_numpy(views(data.train.pixels(part), part, 0)).permute(0, 3, 1, 2)
            model(normalize(pixels.to(next(model.parameters()).device)))
            recorded = recorder.take()
            yield {tap: recorded[name] for tap, name in pairs.items()}


def _fit_pca(features: Iterator[dict[str, Tensor]], projectors: Projectors) -> dict[str, tuple[FeatureProjector, float]]:
    fits: dict[str, PcaFit] = {}
    for recorded in features:
        for tap, feature in recorded.items():
            fits.setdefault(tap, PcaFit(feature.shape[1])).update(feature)
    return {tap: fits[tap].finish(channels, tap=tap) for tap, channels in projectors.pca_channels.items()}


def _saved_projectors(checkpoint: Checkpoint) -> dict[str, FeatureProjector]:
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.get("frozen", {}).items():
        tap, _, name = key.partition("|")
        saved.setdefault(tap, {})[name] = tensor
    projectors = {}
    for tap, tensors in saved.items():
        channels_out, channels_in = tensors["conv.weight"].shape[:2]
        projectors[tap] = FeatureProjector(channels_in, channels_out).requires_grad_(False)
        projectors[tap].load_state_dict(tensors)
    return projectors


def _warn_of_rectified_taps(feature: FeatureConfig, projectors: Projectors) -> list[str]:
    """A student tap that ends in a ReLU cannot reach signed targets without a projector of its own."""
    if projectors.student:
        return []
    return [
        f"distill.feature.direction: {feature.direction} compares the student's tap {tap} directly with signed targets; if it "
        "ends in a ReLU it can never reach the negative ones: direction both has a learned projector there"
        for tap in feature.taps
    ]
