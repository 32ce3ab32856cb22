"""Putting the parts of a training together into the `Job` that the engine runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kd_accel.commands.course import build_course
from kd_accel.commands.data import Data, data_identity, held_out, keep_images_on_gpu, training_loader
from kd_accel.commands.teaching import Teaching
from kd_accel.config import RunConfig
from kd_accel.data.loader import TrainLoader
from kd_accel.engine.average import MovingAverage
from kd_accel.engine.checkpoint import Checkpoint, CheckpointWriter, module_tensors
from kd_accel.engine.evaluate import HeldOut
from kd_accel.engine.finite import FiniteWatch
from kd_accel.engine.interruption import Interruption
from kd_accel.engine.job import Course, Job
from kd_accel.engine.journal import Journal
from kd_accel.engine.meters import Meters
from kd_accel.engine.optim import build_optimizer
from kd_accel.engine.profile import StepProfiler
from kd_accel.engine.progress import Progress
from kd_accel.engine.setup import Accelerator, on_main_process, wrap_for_training
from kd_accel.engine.state import Trainee, restore
from kd_accel.models.layout import weights_layout
from kd_accel.models.student import StudentModule
from kd_accel.models.taps import compile_tapped
from kd_accel.report.tracking import WandbTracking, missing_package_notices
from kd_accel.types import SignalSource, UserError, no_signals


@dataclass(frozen=True)
class Prepared:
    """What is there before the first step."""

    config: RunConfig
    data: Data
    loader: TrainLoader
    course: Course
    module: StudentModule
    teaching: Teaching | None
    checkpoint: Checkpoint | None
    accelerator: Accelerator
    notices: list[str]

    @property
    def signals(self) -> SignalSource:
        return self.teaching.signals if self.teaching else no_signals


def start_tracking(start: Prepared) -> WandbTracking:
    """W&B on the main process, through Accelerate's tracker; a resumed run goes on in the same W&B run."""
    config, accelerator = start.config, start.accelerator
    tracking = WandbTracking(
        config.tracking,
        run_dir=config.directory,
        name=config.name,
        settings=asdict(config),
        run_id=start.checkpoint.state["wandb_id"] if start.checkpoint else None,
    )
    if accelerator.is_main_process:
        tracking.start(lambda kwargs: _wandb_run(accelerator, config, kwargs))
        start.notices.extend(missing_package_notices(config.tracking))
    return tracking


def _wandb_run(accelerator: Accelerator, config: RunConfig, kwargs: dict[str, Any]) -> Any:
    accelerator.trackers.clear()  # of an attempt that failed: they would be started again
    accelerator.init_trackers(config.tracking.project, config=asdict(config), init_kwargs={"wandb": kwargs})
    return accelerator.get_tracker("wandb", unwrap=True)


def plan_course(config: RunConfig, data: Data, accelerator: Accelerator) -> tuple[TrainLoader, Course]:
    """The batches of this rank and the steps that they make. Raises UserError for what these rows cannot be trained with."""
    loader = training_loader(data, config, accelerator)
    course = build_course(config, steps_per_epoch=loader.steps_per_epoch)
    _refuse_a_pause_beyond_the_end(config, course.total_steps)
    return loader, course


def build_job(start: Prepared, tracking: WandbTracking) -> Job:
    config, accelerator = start.config, start.accelerator
    trainee, notices = _build_trainee(start)
    start.notices.extend(notices)
    keep_images_on_gpu(start.loader, start.data, config.data, accelerator.device)
    journal = Journal(config.directory / "metrics.jsonl", is_main=accelerator.is_main_process, tracker=tracking)
    length_bytes = start.checkpoint.state["metrics_bytes"] if start.checkpoint else 0
    on_main_process(accelerator, lambda: journal.start(length_bytes))
    progress = Progress(
        config.name,
        total_steps=start.course.total_steps,
        done_steps=trainee.position.step,
        is_main=accelerator.is_main_process,
    )
    state, tensors = _checkpoint_extra(start, tracking)
    return Job(
        accelerator=accelerator,
        train=config.train,
        checkpoint=config.checkpoint,
        trainee=trainee,
        watch=FiniteWatch(accelerator, trainee.module, trainee.optimizer),
        loader=start.loader,
        signals=start.signals,
        course=start.course,
        journal=journal,
        progress=progress,
        profiler=StepProfiler(
            config.directory / "profile", steps=config.profile, rank=accelerator.process_index, say=progress.say
        ),
        interruption=Interruption(accelerator, timeout_s=config.train.timeout_s),
        writer=CheckpointWriter(),
        checkpoint_dir=config.directory / "checkpoints",
        checkpoint_extra=state,
        checkpoint_tensors=tensors,
        validation=_validation(start),
    )


def _refuse_a_pause_beyond_the_end(config: RunConfig, total_steps: int) -> None:
    stop = config.checkpoint.stop_after_steps
    if stop is not None and stop >= total_steps:
        raise UserError(
            f"checkpoint.stop_after_steps: {stop} has no effect, the training has {total_steps} steps; lower it, or leave it "
            "out"
        )


def _build_trainee(start: Prepared) -> tuple[Trainee, list[str]]:
    """What a step changes, wrapped by Accelerate, in the state of the checkpoint where there is one."""
    config, accelerator, module = start.config, start.accelerator, start.module
    module.to(accelerator.device).to(memory_format=weights_layout(config.train.channels_last, accelerator.device))
    decay = config.train.ema_decay
    average = None if decay is None else MovingAverage(module.student, decay=decay)
    if config.train.compile:
        compile_tapped(module.student)
    wrapped, wrapped_optimizer = wrap_for_training(accelerator, module, build_optimizer(module.parameters(), config.optim))
    trainee = Trainee(wrapped, wrapped_optimizer, Meters(accelerator.device), average)
    if start.checkpoint is None:
        return trainee, []
    return trainee, _restored(trainee, start.checkpoint, accelerator)


def _restored(trainee: Trainee, checkpoint: Checkpoint, accelerator: Accelerator) -> list[str]:
    """Its settings and data fit, so what does not is damage, of whatever kind."""
    try:
        return restore(trainee, checkpoint, accelerator)
    except (KeyError, IndexError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{checkpoint.path}: does not fit the training that its own config describes ({said}); remove it to go on from an "
            "earlier one, or start anew in another run_dir"
        ) from error


def _validation(start: Prepared) -> HeldOut | None:
    if not len(start.data.rows.val):
        return None
    signals = start.teaching.held_out("val") if start.teaching else None
    return held_out(start.data, start.config, start.accelerator, split="val", signals=signals)


def _checkpoint_extra(start: Prepared, tracking: WandbTracking) -> tuple[dict[str, Any], dict[str, Any]]:
    """(plain state, tensors by file) that every checkpoint holds besides the trainee's own."""
    frozen = start.teaching.frozen if start.teaching else {}
    tensors = {
        f"{tap}|{name}": tensor for tap, projector in frozen.items() for name, tensor in module_tensors(projector).items()
    }
    state = {
        "config": asdict(start.config),
        "data": data_identity(start.data),
        "wandb_id": tracking.run_id,
        "teacher_digest": start.teaching.digest if start.teaching else None,
        "cache": start.teaching.cache if start.teaching else None,
        "pca_explained": start.teaching.explained if start.teaching else {},
    }
    return state, {"frozen": tensors} if tensors else {}
