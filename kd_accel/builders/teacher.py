"""The teacher's side of a training: the teacher, its target functions, and the source of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_accel.builders.cache import cache_request, stored_request, target_settings
from kd_accel.builders.student import Losses
from kd_accel.cache.differences import describe_target
from kd_accel.cache.reader import OpenCache, open_cache
from kd_accel.cache.stored_teacher import StoredTeacher
from kd_accel.cache.verify import refuse_other_outputs
from kd_accel.config.schema import RunConfig, TeacherConfig
from kd_accel.data.datamodule import DataModule
from kd_accel.data.splits import Split
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UserError
from kd_accel.losses.targets import TargetFunction
from kd_accel.models.feature_extractor import check_teacher_size, compile_with_hooks, probe_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import Shape
from kd_accel.teacher.fitting import fit_notices, fit_targets
from kd_accel.teacher.loading import Preprocessing, load_own_teacher, load_run_teacher, teacher_notices
from kd_accel.teacher.teacher import LiveTeacher, Teacher
from kd_accel.training.checkpoint import Checkpoint
from kd_accel.types import Batch, StagedTeacher, TeacherOutput, TeacherSource


@dataclass(frozen=True)
class TeacherSetup:
    """Teacher that is ready for a training.

    Args:
        source: Source of the teacher's outputs for training batches.
        held_out: Function that returns the source for a held-out split.
        fingerprint: Fingerprint of the teacher.
        target_shapes: Shape (D, H, W) of each target, by the teacher's layer.
        cache: Digest of what is read from a cache; None without a cache.
        live: Forward of the teacher; None if the teacher does not run during the training.
        targets: Fitted target functions that each checkpoint stores; empty if a cache stores them.
        explained: Share of the variance that each fitted target keeps, by the teacher's layer.
        notices: Lines for the user.
    """

    source: TeacherSource
    held_out: Callable[[Split], TeacherSource]
    fingerprint: str
    target_shapes: Mapping[str, Shape]
    cache: str | None = None
    live: LiveTeacher | None = None
    targets: Mapping[str, TargetFunction] = field(default_factory=dict)
    explained: Mapping[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors on the CPU by "layer|name", as a checkpoint stores them."""
        return {
            f"{layer}|{name}": tensor
            for layer, target in self.targets.items()
            if target.tensors()
            for name, tensor in _fitted(target).items()
        }

    def check_unchanged(self) -> None:
        """Assert that the training has not changed a live teacher."""
        if self.live is not None:
            self.live.check_unchanged()

    def close(self) -> None:
        """Remove the hooks of a live teacher."""
        if self.live is not None:
            self.live.close()


def load_teacher(config: RunConfig, data: DataModule) -> Teacher:
    """Load the teacher of a config.

    Raises:
        UserError: If the weights do not fit the architecture, or the classes differ from those of the data without a class map.
    """
    settings = config.teacher
    assert settings is not None, "checked by config/validation.py"
    refuse_stored_teacher(settings)
    preprocessing = Preprocessing(settings.image_size, settings.interpolation, settings.crop_pct)
    if settings.run is not None:
        teacher = load_run_teacher(Path(settings.run), class_map=settings.class_map, preprocessing=preprocessing)
    else:
        assert settings.arch and settings.weights, "checked by config/validation.py"
        teacher = load_own_teacher(
            settings.arch,
            settings.weights,
            class_names=data.label_names,
            mean=settings.mean,
            std=settings.std,
            stem=settings.stem,
            arch_args=settings.arch_args,
            class_map=settings.class_map,
            preprocessing=preprocessing,
        )
    size = config.data.image_size
    resize = teacher.resize_for(size)
    if settings.interpolation is not None and (resize is None or resize.side == size):
        raise UserError(f"teacher.interpolation: has no effect (views of {size} pixels are not resized for it); leave it out")
    if settings.crop_pct not in (None, 1.0) and (resize is None or resize.side == resize.image_size):
        raise UserError(f"teacher.crop_pct: {settings.crop_pct} has no effect, because it cuts off less than a pixel; lower it")
    check_teacher_size(teacher.network, teacher.input_size(size))
    return teacher.for_classes(data.label_names).for_images(size)


def refuse_stored_teacher(teacher: TeacherConfig) -> None:
    """Raise UserError if only the stored outputs of the teacher are set, for a command that runs it."""
    if teacher.is_stored:
        raise UserError(
            "teacher: neither teacher.run nor teacher.arch is set, but this command runs the teacher; set teacher.run (a run "
            "directory), or teacher.arch with teacher.weights"
        )


def teacher_fingerprint(config: RunConfig, data: DataModule) -> str | None:
    """Return the fingerprint of the teacher of a config, which a cache without a teacher records; None if there is none.

    Raises:
        UserError: If the teacher is not found or does not fit the data.
    """
    if config.teacher is None:
        return None
    if not config.teacher.is_stored:
        return load_teacher(config, data).fingerprint
    directory = Path(config.teacher.cache.dir or "")
    return StoredTeacher.read(directory).fingerprint if (directory / "spec.json").is_file() else None


def build_targets(
    config: RunConfig, losses: Losses, network: nn.Module, teacher: Teacher | StoredTeacher
) -> dict[str, TargetFunction]:
    """Build the target function of each compared layer of the teacher, not fitted.

    Args:
        config: Config of the run.
        losses: Losses of the run.
        network: Student's network.
        teacher: Teacher of the run.

    Returns:
        Target functions by the teacher's layer.

    Raises:
        UserError: If a layer is not found or not a feature map, or one layer would need two different functions.
    """
    teacher_shapes = layer_shapes(config, losses, teacher)
    targets: dict[str, TargetFunction] = {}
    for name, pairs in losses.layers.items():
        section = f"distill.features.{name}"
        shapes = probe_layers(network, list(pairs), image_size=config.data.image_size, field=f"{section}.layers")
        for student_layer, layer in pairs.items():
            try:
                target = losses.features[name].target_function(shapes[student_layer], teacher_shapes[layer])
            except UserError as error:
                raise UserError(f"{section}.args.{error} (layers {student_layer} and {layer})") from None
            existing = targets.setdefault(layer, target)
            if existing.description() != target.description():
                both = f"{describe_target(existing.description())} and {describe_target(target.description())}"
                raise UserError(
                    f"{section}.layers: the teacher's layer {layer} would need two targets, {both}, but a layer can have only "
                    "one; compare other layers, remove one of the losses, or, if both are mse, set the same direction"
                )
    return targets


def layer_shapes(config: RunConfig, losses: Losses, teacher: Teacher | StoredTeacher) -> dict[str, Shape]:
    """Measure the shape (D, H, W) of each compared layer of the teacher. Raises UserError if one is not a feature map."""
    if isinstance(teacher, StoredTeacher):
        return teacher.raw_shapes({layer: settings.layers for layer, settings in target_settings(losses).items()})
    shapes: dict[str, Shape] = {}
    for name, pairs in losses.layers.items():
        field = f"distill.features.{name}.layers (teacher)"
        size = teacher.input_size(config.data.image_size)
        shapes |= probe_layers(teacher.network, list(pairs.values()), image_size=size, field=field)
    return shapes


def teacher_on_device(
    config: RunConfig, teacher: Teacher, accelerator: Accelerator, layers: list[str]
) -> tuple[nn.Module, Normalize]:
    """Copy the teacher's network to the device of this process, with the numerics of the config."""
    return teacher.on_device(
        accelerator.device,
        layers=layers,
        image_size=config.data.image_size,
        channels_last=config.train.channels_last,
        cpu_kernels=config.train.cpu_kernels,
    )


def live_teacher(
    config: RunConfig,
    network: nn.Module,
    normalize: Normalize,
    targets: Mapping[str, TargetFunction],
    accelerator: Accelerator,
    *,
    for_few: bool = False,
) -> LiveTeacher:
    """Build the forward of the teacher, with the numerics of the config. for_few: few samples, which a compilation outlasts."""
    image_size = config.data.image_size
    live = LiveTeacher(network, normalize, targets=targets, autocast=accelerator.autocast, image_size=image_size)
    if config.train.compile and not for_few:
        compile_with_hooks(live.network, dynamic=False)
    return live


def build_teacher_setup(
    config: RunConfig,
    data: DataModule,
    network: nn.Module,
    losses: Losses,
    *,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> TeacherSetup:
    """Load the teacher, build its targets, and prepare the source of its outputs."""
    assert config.teacher is not None
    if config.teacher.is_stored:
        return _setup_without_teacher(config, data, network, losses)
    refuse_absent_run(config.teacher)
    teacher = load_teacher(config, data)
    targets = build_targets(config, losses, network, teacher)
    shapes = layer_shapes(config, losses, teacher)
    target_shapes = {layer: target.output_shape(shapes[layer]) for layer, target in targets.items()}
    cache = None
    if config.teacher.outputs != "live":
        assert config.teacher.cache.dir is not None, "checked by config/validation.py"
        request = cache_request(config, data, teacher, losses, targets, accelerator.device)
        cache = open_cache(Path(config.teacher.cache.dir), request)
    is_cached = config.teacher.outputs == "cached"
    model, normalize = teacher_on_device(config, teacher, accelerator, list(targets))
    notices = teacher_notices(teacher, data.label_names, image_size=config.data.image_size) + _rectified_notices(losses)
    if cache is not None and is_cached:
        cache.load_targets(targets)
    else:
        notices += _fit(targets, data, model, normalize, accelerator, checkpoint)
    for target in targets.values():
        target.to(accelerator.device)
    live = live_teacher(config, model, normalize, targets, accelerator, for_few=cache is not None)
    explained = {layer: target.explained for layer, target in targets.items() if target.explained is not None}
    setup = TeacherSetup(live, lambda split: live, teacher.fingerprint, target_shapes, None, live, targets, explained, notices)
    return setup if cache is None else _with_cache(setup, cache, live, config, data, accelerator)


def _with_cache(
    setup: TeacherSetup, cache: OpenCache, live: LiveTeacher, config: RunConfig, data: DataModule, accelerator: Accelerator
) -> TeacherSetup:
    """Compare a few samples of the cache with the live teacher, and use the cache as source of what it holds."""
    assert config.teacher is not None
    refuse_other_outputs(
        cache,
        live,
        data,
        epochs=config.train.epochs,
        precision=config.train.precision,
        rank=accelerator.process_index,
        device=accelerator.device,
    )
    common: dict[str, Any] = {
        "held_out": cache.source,
        "fingerprint": setup.fingerprint,
        "target_shapes": setup.target_shapes,
        "cache": cache.digest,
        "explained": setup.explained,
        "notices": setup.notices,
    }
    if config.teacher.outputs == "cached":
        live.close()
        live.network.cpu()
        return TeacherSetup(source=cache.source("train", keeps_views=True), **common)
    if config.train.compile:
        compile_with_hooks(live.network, dynamic=False)
    mixed = _LogitsFrom(cache.source("train", keeps_views=True), live)
    return TeacherSetup(source=mixed, live=live, targets=setup.targets, **common)


def _setup_without_teacher(config: RunConfig, data: DataModule, network: nn.Module, losses: Losses) -> TeacherSetup:
    """Prepare a training from a cache alone. No output is recomputed, so only files that have changed are found."""
    assert config.teacher is not None and config.teacher.cache.dir is not None, "checked by config/validation.py"
    teacher = StoredTeacher.read(Path(config.teacher.cache.dir))
    targets = build_targets(config, losses, network, teacher)
    shapes = layer_shapes(config, losses, teacher)
    cache = open_cache(teacher.directory, stored_request(config, data, teacher, losses, targets))
    cache.load_targets(targets)
    return TeacherSetup(
        source=cache.source("train", keeps_views=True),
        held_out=cache.source,
        fingerprint=teacher.fingerprint,
        target_shapes={layer: target.output_shape(shapes[layer]) for layer, target in targets.items()},
        cache=cache.digest,
        explained={layer: target.explained for layer, target in targets.items() if target.explained is not None},
        notices=[teacher.notice(), *_rectified_notices(losses)],
    )


def refuse_absent_run(teacher: TeacherConfig) -> None:
    """Raise UserError for a teacher that is not on this machine, although its stored outputs may be."""
    if teacher.run is None or (Path(teacher.run) / "model.json").exists():
        return
    message = f"teacher.run: no finished run in {teacher.run}; train it first, or choose another directory"
    if teacher.outputs == "cached":
        message += (
            ". To train from the stored outputs alone, set teacher.run to null: they are then used without a comparison with "
            "the teacher"
        )
    raise UserError(message)


@dataclass(frozen=True)
class _LogitsFrom:
    """Source of teacher outputs with the logits of one source and the features of another (`outputs: mixed`)."""

    logits: StagedTeacher
    features: StagedTeacher

    def __call__(self, batch: Batch) -> TeacherOutput:
        return self.finish(batch, self.fetch(batch))

    def fetch(self, batch: Batch) -> tuple[Tensor, ...]:
        assert not self.features.fetch(batch), "a live teacher has nothing to fetch"
        return self.logits.fetch(batch)

    def finish(self, batch: Batch, fetched: tuple[Tensor, ...]) -> TeacherOutput:
        return TeacherOutput(self.logits.finish(batch, fetched).logits, self.features.finish(batch, ()).features)


def _fit(
    targets: Mapping[str, TargetFunction],
    data: DataModule,
    network: nn.Module,
    normalize: nn.Module,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
) -> list[str]:
    """Fit the targets on the main process, or load them from the checkpoint. Returns notices."""
    if checkpoint is not None:
        load_saved(targets, checkpoint.tensors.get("targets", {}), checkpoint.state["explained"])
        return []
    if all(target.is_fitted for target in targets.values()):
        return []

    def fit() -> dict[str, tuple[dict[str, Tensor], float | None]]:
        fit_targets(targets, data, network, normalize, autocast=accelerator.autocast)
        return {layer: (_fitted(target), target.explained) for layer, target in targets.items()}

    for layer, (tensors, explained) in on_main_process(accelerator, fit).items():
        targets[layer].load(tensors)
        targets[layer].explained = explained
    return fit_notices(targets, num_samples=len(data.training_samples))


def load_saved(targets: Mapping[str, TargetFunction], tensors: Mapping[str, Tensor], explained: Mapping[str, float]) -> None:
    """Load fitted tensors named "layer|name" into the target functions."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition("|")
        by_layer.setdefault(layer, {})[name] = tensor
    for layer, target in targets.items():
        target.load(by_layer.get(layer, {}))
        target.explained = explained.get(layer)


def _fitted(target: TargetFunction) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in target.tensors().items()}


def _rectified_notices(losses: Losses) -> list[str]:
    """Return a warning for each student layer without a projector: a layer that ends in a ReLU has no negative outputs."""
    return [
        f"distill.features.{name}.args.direction: teacher_to_student compares the student's layer {layer} with targets that "
        "can be negative; if the layer ends in a ReLU, it cannot reach them: direction both adds a learned projector"
        for name, loss in losses.features.items()
        if getattr(loss.settings, "direction", None) == "teacher_to_student"
        for layer in losses.layers[name]
    ]
