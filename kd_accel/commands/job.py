"""Putting the parts of a training together into the `Job` that the engine runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kd_accel.commands.schedule import build_schedule
from kd_accel.commands.teacher_setup import TeacherSetup
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import Data, data_fingerprint, keep_images_on_gpu, training_loader
from kd_accel.data.loader import TrainLoader
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UserError
from kd_accel.models.feature_extractor import compile_with_hooks
from kd_accel.models.memory_format import weight_memory_format
from kd_accel.models.student import StudentModule
from kd_accel.training.average import MovingAverage
from kd_accel.training.checkpoint import Checkpoint, CheckpointWriter, module_tensors
from kd_accel.training.evaluation import HeldOut, held_out
from kd_accel.training.job import Job, TrainingSchedule
from kd_accel.training.metrics import Meters
from kd_accel.training.metrics_log import MetricsLog
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import build_optimizer
from kd_accel.training.preemption import PreemptionHandler
from kd_accel.training.profile import StepProfiler
from kd_accel.training.progress import Progress
from kd_accel.training.state import TrainState, restore, wrap_for_training
from kd_accel.training.wandb_tracker import WandbTracking, missing_package_notices
from kd_accel.types import TeacherSource, no_teacher


@dataclass(frozen=True)
class TrainingSetup:
    """What is there before the first step."""

    config: RunConfig
    data: Data
    loader: TrainLoader
    schedule: TrainingSchedule
    module: StudentModule
    teacher_setup: TeacherSetup | None
    checkpoint: Checkpoint | None
    accelerator: Accelerator
    notices: list[str]

    @property
    def teacher(self) -> TeacherSource:
        return self.teacher_setup.source if self.teacher_setup else no_teacher


def start_tracking(start: TrainingSetup) -> WandbTracking:
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


def plan_schedule(config: RunConfig, data: Data, accelerator: Accelerator) -> tuple[TrainLoader, TrainingSchedule]:
    """The batches of this rank and the steps that they make. Raises UserError for what these samples cannot be trained with."""
    loader = training_loader(data, config, accelerator)
    schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch)
    _refuse_a_pause_beyond_the_end(config, schedule.total_steps)
    return loader, schedule


def build_job(start: TrainingSetup, tracking: WandbTracking) -> Job:
    config, accelerator = start.config, start.accelerator
    train_state, notices = _build_train_state(start)
    start.notices.extend(notices)
    keep_images_on_gpu(start.loader, start.data, config.data, accelerator.device)
    metrics_log = MetricsLog(config.directory / "metrics.jsonl", is_main=accelerator.is_main_process, tracker=tracking)
    length_bytes = start.checkpoint.state["metrics_bytes"] if start.checkpoint else 0
    on_main_process(accelerator, lambda: metrics_log.start(length_bytes))
    progress = Progress(
        config.name,
        total_steps=start.schedule.total_steps,
        done_steps=train_state.position.step,
        is_main=accelerator.is_main_process,
    )
    state, tensors = _checkpoint_extra(start, tracking)
    return Job(
        accelerator=accelerator,
        train=config.train,
        checkpoint=config.checkpoint,
        train_state=train_state,
        guard=NonFiniteGuard(accelerator, train_state.module, train_state.optimizer),
        loader=start.loader,
        teacher=start.teacher,
        schedule=start.schedule,
        metrics_log=metrics_log,
        progress=progress,
        profiler=StepProfiler(
            config.directory / "profile", steps=config.profile, rank=accelerator.process_index, say=progress.say
        ),
        preemption=PreemptionHandler(accelerator, timeout_s=config.train.timeout_s),
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


def _build_train_state(start: TrainingSetup) -> tuple[TrainState, list[str]]:
    """What a step changes, wrapped by Accelerate, in the state of the checkpoint where there is one."""
    config, accelerator, module = start.config, start.accelerator, start.module
    module.to(accelerator.device).to(memory_format=weight_memory_format(config.train.channels_last, accelerator.device))
    decay = config.train.ema_decay
    average = None if decay is None else MovingAverage(module.student, decay=decay)
    if config.train.compile:
        compile_with_hooks(module.student)
    wrapped, wrapped_optimizer = wrap_for_training(accelerator, module, build_optimizer(module.parameters(), config.optim))
    train_state = TrainState(wrapped, wrapped_optimizer, Meters(accelerator.device), average)
    if start.checkpoint is None:
        return train_state, []
    return train_state, _restored(train_state, start.checkpoint, accelerator)


def _restored(train_state: TrainState, checkpoint: Checkpoint, accelerator: Accelerator) -> list[str]:
    """Its settings and data fit, so what does not is damage, of whatever kind."""
    try:
        return restore(train_state, checkpoint, accelerator)
    except (KeyError, IndexError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{checkpoint.path}: does not fit the training that its own config describes ({said}); remove it to go on from an "
            "earlier one, or start anew in another run_dir"
        ) from error


def _validation(start: TrainingSetup) -> HeldOut | None:
    if not len(start.data.splits.val):
        return None
    teacher = start.teacher_setup.held_out("val") if start.teacher_setup else None
    return held_out(start.data, start.config, start.accelerator, split="val", teacher=teacher)


def _checkpoint_extra(start: TrainingSetup, tracking: WandbTracking) -> tuple[dict[str, Any], dict[str, Any]]:
    """(plain state, tensors by file) that every checkpoint holds besides the trainee's own."""
    frozen = start.teacher_setup.frozen if start.teacher_setup else {}
    tensors = {
        f"{layer}|{name}": tensor for layer, projector in frozen.items() for name, tensor in module_tensors(projector).items()
    }
    state = {
        "config": asdict(start.config),
        "data": data_fingerprint(start.data),
        "wandb_id": tracking.run_id,
        "teacher_digest": start.teacher_setup.digest if start.teacher_setup else None,
        "cache": start.teacher_setup.cache if start.teacher_setup else None,
        "pca_explained": start.teacher_setup.explained if start.teacher_setup else {},
    }
    return state, {"frozen": tensors} if tensors else {}
