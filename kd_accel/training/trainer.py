"""The one training loop: teacher, plain student and every distillation run through it and differ only in what they are given.

In: a `Job` (loader, signal source, course of loss and learning rate, trainee). Out: the trained weights inside the trainee,
lines in metrics.jsonl, checkpoints. A step never waits for the device; values are read where a line of metrics is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_accel.errors import UserError
from kd_accel.profiling import profiled, profiler_range
from kd_accel.training.evaluation import HeldOut, evaluate, synchronize_buffers
from kd_accel.training.job import Job
from kd_accel.training.optim import set_learning_rate
from kd_accel.training.preemption import preempted
from kd_accel.training.saving import look, save, settle
from kd_accel.training.state import TrainState
from kd_accel.types import Batch, LossFunction, LossTerms, StudentOutput, TeacherOutput, TeacherSource


def train(job: Job) -> None:
    """Run from where the trainee stands to the end of the course, or to `checkpoint.stop_after_steps`."""
    _refuse_single_samples(job)
    position = job.train_state.position
    while not job.must_stop:
        with refused_by_determinism():
            train_epoch(job)
        if job.must_stop:
            job.profiler.close()
        if position.step_in_epoch == job.schedule.steps_per_epoch or job.is_done:
            finish_epoch(job)
            if not job.is_done:
                _stop_if_preempted(job)
    settle(job)


@contextmanager
def refused_by_determinism() -> Iterator[None]:
    """Raise UserError for an operator of the model that has no deterministic kernel, where only such may be used."""
    try:
        yield
    except RuntimeError as error:
        name, found, _ = str(error).partition(" does not have a deterministic implementation")
        if not found:
            raise
        raise UserError(
            f"train.deterministic: {name.split()[-1]} of the model has no deterministic GPU kernel; use another layer in its "
            "place, or set train.deterministic to false"
        ) from None


def train_step(
    student: nn.Module, teacher: TeacherSource, loss: LossFunction, batch: Batch
) -> tuple[LossTerms, StudentOutput, TeacherOutput]:
    """Forward of one micro-batch: the teacher's answer, the student's, and the loss between them and the labels."""
    with profiler_range("teacher"):
        answer = teacher(batch)
    with profiler_range("student"):
        logits, pairs = student(batch.images, answer.features or None)
    output = StudentOutput(logits, pairs)
    with profiler_range("loss"):
        return loss(output, answer, batch.labels), output, answer


def student_logits(train_state: TrainState, accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """The forward that is evaluated and saved: the moving average where there is one, outside the DDP wrapper."""
    module = accelerator.unwrap_model(train_state.module)
    network = module.student if train_state.average is None else train_state.average
    return lambda images: network(module.normalize(images))


def measure(job: Job, held_out: HeldOut) -> dict[str, float]:
    """Evaluate the student on a split; the training mode comes back afterwards."""
    train_state = job.train_state
    for module in filter(None, (train_state.module, train_state.average)):
        synchronize_buffers(module, accelerator=job.accelerator)
        module.eval()
    result = evaluate(student_logits(train_state, job.accelerator), held_out, accelerator=job.accelerator)
    train_state.module.train()
    return result


def train_epoch(job: Job) -> None:
    """Steps from the position to the end of the epoch, of the course, or to the pause."""
    position, train_state = job.train_state.position, job.train_state
    train_state.module.train()
    clock = _Clock(position.elapsed_s)
    steps = job.loader.epoch(position.epoch, start_step=position.step_in_epoch)
    for micro_batches in profiled("loader", steps):
        loss, values = job.schedule.loss_at(position.epoch, position.step)
        lr = job.schedule.lr_at(position.step)
        _optimizer_step(job, micro_batches, loss, lr)
        position.step += 1
        position.step_in_epoch += 1
        is_last = position.step_in_epoch == job.schedule.steps_per_epoch or job.is_done
        if is_last or position.step % job.train.log_every_steps == 0:
            with profiler_range("logging"):
                _log(job, {**values, "lr": lr}, clock)
        position.elapsed_s = clock.elapsed_s
        job.progress.advance()
        job.profiler.step()
        if is_last:
            break
        if job.must_stop or _is_due(position.step, job.checkpoint.every_steps):
            save(job)
        if job.must_stop:
            break
        _stop_if_preempted(job)
    position.elapsed_s = clock.elapsed_s


def _stop_if_preempted(job: Job) -> None:
    """Raises Interrupted, after a checkpoint, on all ranks at the same step."""
    number = job.preemption.requested()
    if number is not None:
        save(job)
        settle(job)
        raise preempted(number, step=job.train_state.position.step)


def _optimizer_step(job: Job, micro_batches: Sequence[Batch], loss: LossFunction, lr: float) -> None:
    """One update from all micro-batches; the ranks exchange gradients in the last backward only."""
    accelerator, train_state, guard = job.accelerator, job.train_state, job.guard
    for index, batch in enumerate(micro_batches):
        on_device = batch.to(accelerator.device, non_blocking=True)
        is_last = index == len(micro_batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(train_state.module):
            with accelerator.autocast():
                terms, output, answer = train_step(train_state.module, job.teacher, loss, on_device)
            with profiler_range("backward"):
                accelerator.backward(guard.guarded(terms, output, answer, batch.samples) / len(micro_batches))
        with profiler_range("logging"):
            train_state.meters.update(terms, output.logits, on_device.labels, teacher_logits_BC=answer.logits)
    with profiler_range("optimizer"):
        _update(job, lr)


def _update(job: Job, lr: float) -> None:
    """From the gradients that are there, unless one of them is not finite."""
    accelerator, train_state, guard, clip_norm = job.accelerator, job.train_state, job.guard, job.schedule.optim.clip_norm
    _refuse_idle_parameters(guard.without_gradient())
    if clip_norm is not None:
        accelerator.unscale_gradients(train_state.optimizer)
    norm = guard.gradient_norm(train_state.position.step + 1)
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(train_state.module.parameters(), clip_norm, norm)
    set_learning_rate(train_state.optimizer, lr)
    train_state.optimizer.step()
    if train_state.average is not None:
        train_state.average.update(accelerator.unwrap_model(train_state.module).student)
    train_state.optimizer.zero_grad(set_to_none=True)


def finish_epoch(job: Job) -> None:
    """Validate, remember the best, move to the next epoch, save."""
    position = job.train_state.position
    position.epoch, position.step_in_epoch = position.epoch + 1, 0
    if job.validation is not None and (job.is_done or _is_due(position.epoch, job.train.eval_every_epochs)):
        with profiler_range("evaluation"):
            result = measure(job, job.validation)
        position.best_val_accuracy = max(result["accuracy"], position.best_val_accuracy or 0.0)
        job.metrics_log.write({"step": position.step, "epoch": position.epoch, "split": "val", **result})
        job.progress.note_epoch(position.epoch, result)
    if (
        job.must_stop
        or _is_due(position.epoch, job.checkpoint.every_epochs)
        or _is_due(position.step, job.checkpoint.every_steps)
    ):
        save(job)


def _log(job: Job, values: dict[str, float], clock: _Clock) -> None:
    look(job)
    position, meters = job.train_state.position, job.train_state.meters
    sums = job.accelerator.reduce(meters.sums, "sum")
    assert isinstance(sums, Tensor)
    means = meters.read(sums)
    rate = float(sums[0]) / clock.lap_s() if clock.has_lap else None
    job.metrics_log.write(
        {
            **{"step": position.step, "epoch": position.epoch, "split": "train", **means, **values},
            **({"images_per_second": rate} if rate else {}),
        }
    )
    job.progress.note(position.epoch, {**means, **({"images_per_second": rate} if rate else {})})


def _is_due(count: int, every: int | None) -> bool:
    return every is not None and count % every == 0


def _refuse_single_samples(job: Job) -> None:
    """The statistics of BatchNorm are those of one forward of one process."""
    parts = job.accelerator.num_processes * job.train.grad_accum_steps
    if job.train.batch_size == parts and any(isinstance(module, _BatchNorm) for module in job.train_state.module.modules()):
        raise UserError(
            f"train.batch_size: {parts} over {job.accelerator.num_processes} processes x {job.train.grad_accum_steps} "
            f"accumulation steps is one sample in each forward, too few for the model's BatchNorm layers; use {2 * parts} or more"
        )


def _refuse_idle_parameters(idle: Sequence[str]) -> None:
    """Where ranks exchange gradients, a parameter without one would make them hang or drift."""
    if idle:
        more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
        raise UserError(
            f"model.arch: no gradient reaches {', '.join(idle[:5])}{more}; every trained parameter must take part in the "
            "output: remove the idle layer, use it, or set requires_grad to False"
        )


class _Clock:
    """Training time: in all, and since the last line of metrics."""

    def __init__(self, elapsed_before_s: float) -> None:
        self._started_at = self._lap_at = time.perf_counter()
        self._before_s = elapsed_before_s

    @property
    def has_lap(self) -> bool:
        return time.perf_counter() > self._lap_at

    @property
    def elapsed_s(self) -> float:
        return self._before_s + time.perf_counter() - self._started_at

    def lap_s(self) -> float:
        now = time.perf_counter()
        lap_s, self._lap_at = now - self._lap_at, now
        return lap_s
