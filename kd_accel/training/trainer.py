"""The training loop of every run: of a teacher, a plain student and a distillation, which differ only in the parts passed in.

In: batches, teacher outputs, a distiller, schedules. Out: the trained weights in the distiller, lines in metrics.jsonl,
checkpoints. A step never synchronizes the device; values are read only for a line of metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_accel.config.schema import TrainConfig
from kd_accel.data.loader import TrainLoader
from kd_accel.distributed import Accelerator, on_main_process
from kd_accel.errors import UnreadableImage, UserError
from kd_accel.models.weights import save_weights
from kd_accel.profiling import StepProfiler, profiled, profiler_range
from kd_accel.training.evaluation import HeldOut, Record, evaluate, synchronize_buffers
from kd_accel.training.metrics import MetricsLog
from kd_accel.training.preemption import UNREADABLE, UNWRITTEN, PreemptionHandler, preempted
from kd_accel.training.progress import Progress
from kd_accel.training.saving import CheckpointSaver
from kd_accel.training.schedules import TrainingSchedule
from kd_accel.training.state import Position, TrainState
from kd_accel.training.step import TrainStep
from kd_accel.training.unreadable import AHEAD_STEPS, ReadAhead, raise_on_all_ranks
from kd_accel.types import Batch


@dataclass
class Trainer:
    """Trainer of one run, from its present position to the end of the schedule. Every rank must create it.

    Args:
        accelerator: The launch's `Accelerator`.
        step: Optimizer step, with the state that it changes.
        loader: Loader of this rank's training batches.
        schedule: Learning rate, temperature and loss weights by position.
        settings: Settings of the loop.
        checkpoints: Saver of the state.
        metrics_log: Log of the lines of metrics.
        progress: Progress display.
        profiler: Profiler of a few steps, if the run's `profile` is set.
        preemption: Handler of the signals that stop the training.
        validation: The split that is evaluated after epochs; None = no evaluation.
        best_file: File of the weights of the best epoch; None = they are not kept.
        note_unreadable: Function that receives the index of a training sample that cannot be read, before a checkpoint.
    """

    accelerator: Accelerator
    step: TrainStep
    loader: TrainLoader
    schedule: TrainingSchedule
    settings: TrainConfig
    checkpoints: CheckpointSaver
    metrics_log: MetricsLog
    progress: Progress
    profiler: StepProfiler
    preemption: PreemptionHandler
    validation: HeldOut | None = None
    best_file: Path | None = None
    note_unreadable: Callable[[int], None] = lambda sample: None
    _steps: ReadAhead | None = field(default=None, init=False)

    @property
    def train_state(self) -> TrainState:
        """The state that a step changes."""
        return self.step.train_state

    @property
    def network(self) -> nn.Module:
        """The network to evaluate and save: the moving average of the student if there is one, else the student."""
        average = self.train_state.average
        return self.step.distiller.student if average is None else average.module

    @property
    def is_done(self) -> bool:
        """True if all steps of the schedule are done, or the training has been stopped early."""
        position = self.train_state.position
        return position.stopped_early or position.step >= self.schedule.total_steps

    @property
    def must_stop(self) -> bool:
        """True if the training is done, or `checkpoint.stop_after_steps` is reached."""
        return self.is_done or self.train_state.position.step == self.checkpoints.settings.stop_after_steps

    def fit(self) -> None:
        """Train to the end of the schedule, or to `checkpoint.stop_after_steps`.

        Raises:
            UserError: If a value is not finite, a parameter has no gradient, or a checkpoint cannot be written.
            Preempted: If a signal has been received, after a checkpoint.
        """
        self._refuse_single_samples()
        position = self.train_state.position
        # An epoch without its evaluation, which has failed before this resume, is finished first.
        while not self.must_stop or (self.is_done and position.step_in_epoch):
            with determinism_errors_explained():
                self.fit_epoch()
            if self.must_stop:
                self.profiler.close()
            if position.step_in_epoch == self.schedule.steps_per_epoch or self.is_done:
                self.finish_epoch()
                if not self.is_done:
                    self._stop_if_due()
        self.checkpoints.wait()

    def fit_epoch(self) -> None:
        """Run steps to the end of the epoch or of the schedule, or to `checkpoint.stop_after_steps`."""
        if self.must_stop:
            return
        position, train_state = self.train_state.position, self.train_state
        train_state.module.train()
        clock = _Clock(position)
        for micro_batches in profiled("loader", self._read_steps()):
            weights, lr = self.schedule.weights_at(position.epoch, position.step), self.schedule.lr_at(position.step)
            self.step(micro_batches, weights, lr)
            position.step += 1
            position.step_in_epoch += 1
            is_last = position.step_in_epoch == self.schedule.steps_per_epoch or self.is_done
            if is_last or position.step % self.settings.log_every_steps == 0:
                with profiler_range("logging"):
                    self._log({**self.schedule.logged(weights), "lr": lr}, clock)
            position.elapsed_s = clock.elapsed_s
            self.progress.advance()
            self.profiler.step()
            if is_last:
                break
            if self.must_stop or _is_due(position.step, self.checkpoints.settings.every_steps):
                self.save()
            if self.must_stop:
                break
            self._stop_if_due()
        position.elapsed_s = clock.elapsed_s

    def _read_steps(self) -> Iterator[Sequence[Batch]]:
        """Return the steps of the epoch, of which the first are read. Raises UnreadableImage, on all ranks, if that fails."""
        position, is_in_memory = self.train_state.position, self.loader.is_in_memory
        steps = self.loader.epoch(position.epoch, start_step=position.step_in_epoch)
        self._steps = ReadAhead(steps, ahead_steps=0 if is_in_memory else AHEAD_STEPS)
        if not is_in_memory:
            self._steps.fill(AHEAD_STEPS)
            self._stop_if_unreadable(self._steps.failure)
        return self._steps

    def _stop_if_unreadable(self, failure: UnreadableImage | None) -> None:
        """Raise UnreadableImage, on all ranks after a checkpoint, if a rank has failed to read a training image."""
        try:
            raise_on_all_ranks(failure, self.accelerator)
        except UnreadableImage as error:
            self.note_unreadable(error.sample)
            self._stop_for(error)

    def _stop_for(self, error: UnreadableImage) -> NoReturn:
        """Raise an error that all ranks have, after a checkpoint."""
        self.save()
        self.checkpoints.wait()
        raise error.with_remedy(
            f"stopped after step {self.train_state.position.step}, with a checkpoint. Restore or replace the image, then run "
            "the same command again to resume; to train without such images, set data.on_error to skip in another run_dir"
        ) from None

    def finish_epoch(self) -> None:
        """Evaluate on the validation samples and save a checkpoint, each if it is due, and advance to the next epoch."""
        position, saving = self.train_state.position, self.checkpoints.settings
        epochs_done = position.epoch + 1
        if self.validation is not None and (self.is_done or _is_due(epochs_done, self.settings.eval_every_epochs)):
            result = self._validate(self.validation)
            self.metrics_log.write({"step": position.step, "epoch": epochs_done, "split": "val", **result})
            self.progress.note_epoch(epochs_done, result)
            self._select(result, epochs_done)
        position.epoch, position.step_in_epoch = epochs_done, 0
        is_due = _is_due(position.epoch, saving.every_epochs) or _is_due(position.step, saving.every_steps)
        if self.must_stop or is_due:
            self.save()

    def _select(self, result: Mapping[str, float], epochs_done: int) -> None:
        """Keep the weights if they are the best so far, and stop the training if the best ones are too many epochs old.

        The result is the same on all ranks.
        """
        position, patience = self.train_state.position, self.settings.early_stopping_epochs
        if position.note_validation(result, epochs_done=epochs_done) and self.best_file is not None:
            self.train_state.best = {name: tensor.to("cpu", copy=True) for name, tensor in self.network.state_dict().items()}
            self.save_best()
        if patience is not None and not self.is_done:
            assert position.best_epoch is not None, "noted above"
            position.stopped_early = epochs_done - position.best_epoch >= patience

    def save_best(self) -> None:
        """Write the weights of the best epoch, if there are any, from the main process. Every rank must call it.

        Raises:
            UserError: If the file cannot be written.
        """
        path, best = self.best_file, self.train_state.best
        if path is not None and best is not None:
            on_main_process(self.accelerator, lambda: save_weights(path, best))

    def _validate(self, validation: HeldOut) -> dict[str, float]:
        """Evaluate on the validation samples. If one cannot be read, the checkpoint is at the end of the open epoch."""
        try:
            with profiler_range("evaluation"):
                return self.evaluate(validation)
        except UnreadableImage as error:
            self._stop_for(error)

    def evaluate(self, held_out: HeldOut, *, record: Record | None = None) -> dict[str, float]:
        """Evaluate the student, or its moving average if there is one, on a split. Every rank must call it.

        The module is in training mode afterwards.

        Args:
            held_out: The split.
            record: Function that is called with each batch of this rank.

        Returns:
            The metrics of `training.evaluation.evaluate`.
        """
        train_state = self.train_state
        for module in filter(None, (train_state.module, train_state.average)):
            synchronize_buffers(module, accelerator=self.accelerator)
            module.eval()
        result = evaluate(self.student_logits(), held_out, accelerator=self.accelerator, record=record)
        train_state.module.train()
        return result

    def student_logits(self) -> Callable[[Tensor], Tensor]:
        """Return the forward for evaluations, uint8 images [B, 3, H, W] -> logits [B, C], outside of the DDP wrapper.

        It runs the moving average if there is one, else the student.
        """
        distiller, average = self.step.distiller, self.train_state.average
        return distiller.student_logits if average is None else lambda images: average(distiller.normalize(images))

    def save(self) -> None:
        """Start to write a checkpoint. Every rank must call it.

        Raises:
            UserError: If a loss, gradient or weight is not finite, or the previous checkpoint could not be written.
        """
        with profiler_range("checkpoint"):
            self._read_guard()
            self.checkpoints.save(self.train_state, metrics_bytes=self.metrics_log.length_bytes())

    def _log(self, values: dict[str, float], clock: _Clock) -> None:
        self._read_guard()
        position, meters = self.train_state.position, self.train_state.meters
        sums = self.accelerator.reduce(meters.sums, "sum")
        assert isinstance(sums, Tensor)
        means: dict[str, float] = meters.read(sums)
        # Not from the sums: after a resume they include the samples since the last line of the stopped training.
        rate = {"images_per_second": self.settings.batch_size * clock.steps_per_second(position.step)}
        self.metrics_log.write(
            {"step": position.step, "epoch": position.epoch, "split": "train", **means, **values, **rate},
        )
        self.progress.note(position.epoch, {**means, **rate})

    def _read_guard(self) -> None:
        """Count the fp16 overflows since the last call. Raises UserError, on all ranks, if a step was not finite."""
        overflowed = self.step.guard.check()
        if self.accelerator.scaler is not None and self.accelerator.is_main_process:
            self.train_state.meters.count_overflows(overflowed)

    def _stop_if_due(self) -> None:
        """Raise UserError for a failed write, or Preempted after a checkpoint, on all ranks at the same step."""
        unreadable = self._steps.failure if self._steps else None
        number = self.preemption.requested(UNWRITTEN if self.checkpoints.has_failed else UNREADABLE if unreadable else 0)
        if number == UNWRITTEN:
            self.checkpoints.wait()
        elif number == UNREADABLE:
            self._stop_if_unreadable(unreadable)
        elif number is not None:
            self.save()
            self.checkpoints.wait()
            raise preempted(number, step=self.train_state.position.step)

    def _refuse_single_samples(self) -> None:
        """Raise UserError if BatchNorm would get a single sample: it computes statistics per forward and process."""
        processes, batch_size = self.accelerator.num_processes, self.settings.batch_size
        parts = processes * self.settings.grad_accum_steps
        norms = [module for module in self.train_state.module.modules() if isinstance(module, _BatchNorm)]
        if batch_size == parts and any(norm.training for norm in norms):
            raise UserError(
                f"train.batch_size: {parts} over {processes} processes x {self.settings.grad_accum_steps} accumulation steps "
                f"is one sample in each forward, too few for the model's BatchNorm layers; use {2 * parts} or more"
            )


@contextmanager
def determinism_errors_explained() -> Iterator[None]:
    """Inside the `with` block, turn PyTorch's error for an operator without a deterministic kernel into UserError."""
    try:
        yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"train.deterministic: {name.split()[-1]} of the model has no deterministic GPU kernel; replace the layer, or set "
            "train.deterministic to false"
        ) from None


def _is_due(count: int, every: int | None) -> bool:
    return every is not None and count % every == 0


class _Clock:
    """Clock of the training time, and of the rate since the last line of metrics."""

    def __init__(self, position: Position) -> None:
        self._started_at = self._lap_at = time.perf_counter()
        self._before_s, self._lap_step = position.elapsed_s, position.step

    @property
    def elapsed_s(self) -> float:
        return self._before_s + time.perf_counter() - self._started_at

    def steps_per_second(self, step: int) -> float:
        """Compute the rate since the last call, or since the start, and start the next interval at `step`."""
        now = time.perf_counter()
        rate = (step - self._lap_step) / max(now - self._lap_at, 1e-9)
        self._lap_at, self._lap_step = now, step
        return rate
