"""One optimizer step: inputs on the device, teacher, student, losses, gradients, update.

A step has three parts. `prepare` needs the host: it reads cached outputs and copies the batch to the device. `compute` is work
of the device alone, which a CUDA graph can replay (training/graphed.py). What the host counts and keeps comes last.

In: micro-batches, temperature and weights, learning rate. Out: changed weights, sums for the metrics, a record for the guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from kd_accel.distributed import Accelerator
from kd_accel.errors import UserError
from kd_accel.losses.distiller import Distiller, DistillerOutput, LossWeights
from kd_accel.profiling import profiler_range
from kd_accel.training.nonfinite import NonFiniteGuard, StepValues
from kd_accel.training.optim import set_learning_rate
from kd_accel.training.state import TrainState
from kd_accel.types import Batch, StagedTeacher, TeacherOutput, TeacherSource


@dataclass(frozen=True)
class StepInput:
    """Inputs of one micro-batch on the device.

    Attributes:
        batch: The batch; its `index` is in host memory and is not read on the device.
        index: Positions of the samples in their source split, int64 [B]; None unless a loss needs them.
        fetched: Tensors that the teacher's `fetch` has returned.
    """

    batch: Batch
    index: Tensor | None
    fetched: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors on the device."""
        return [self.batch.images, self.batch.labels, *([] if self.index is None else [self.index]), *self.fetched]

    def clone(self) -> StepInput:
        """Return a copy in new memory."""
        batch = replace(self.batch, images=self.batch.images.clone(), labels=self.batch.labels.clone())
        index = None if self.index is None else self.index.clone()
        return StepInput(batch, index, tuple(tensor.clone() for tensor in self.fetched))


Compute = Callable[[Iterable[StepInput], int, LossWeights], StepValues]
"""Function (inputs of each micro-batch, their number, weights) that makes one update and returns the values for the guard."""


@dataclass
class TrainStep:
    """Optimizer step of a training.

    Args:
        accelerator: The launch's `Accelerator`.
        train_state: The state that a step changes; its module is a distiller prepared by Accelerate.
        teacher: Source of the teacher's output for a batch.
        guard: Detection of losses and gradients that are not finite.
        clip_norm: Largest norm of the gradients; None = not clipped.
    """

    accelerator: Accelerator
    train_state: TrainState
    teacher: TeacherSource
    guard: NonFiniteGuard
    clip_norm: float | None = None
    distiller: Distiller = field(init=False)
    replay: Compute | None = field(default=None, init=False)
    """Function that replays `compute` as a CUDA graph; None = without a graph."""

    def __post_init__(self) -> None:
        # Only once: each call of Accelerate's unwrap_model searches the installed packages, which takes about a millisecond.
        self.distiller = self.accelerator.unwrap_model(self.train_state.module)
        self._staged = self.teacher if isinstance(self.teacher, StagedTeacher) else _Fetched(self.teacher, self.accelerator)

    def __call__(self, micro_batches: Sequence[Batch], weights: LossWeights, lr: float) -> None:
        """Make one update from all micro-batches; the ranks exchange gradients only in the last backward pass.

        Args:
            micro_batches: The batches of this rank, in host memory or on the device.
            weights: Temperature and loss weights of this step.
            lr: Learning rate of this step.

        Raises:
            UserError: If a trained parameter has no gradient.
        """
        train_state = self.train_state
        # Accelerate's wrapper searches the installed packages and inspects a signature in each step.
        set_learning_rate(train_state.optimizer.optimizer, lr)
        values = (self.replay or self.compute)(map(self.prepare, micro_batches), len(micro_batches), weights)
        self.guard.add(train_state.position.step + 1, [batch.index for batch in micro_batches], values)
        train_state.meters.count_samples(sum(len(batch.labels) for batch in micro_batches))
        if train_state.average is not None:
            with profiler_range("average"):
                train_state.average.update(self.distiller.student, step=train_state.position.step)

    def prepare(self, batch: Batch) -> StepInput:
        """Copy a micro-batch to the device, and fetch what the host has of the teacher's output."""
        on_device = batch.to(self.accelerator.device, non_blocking=True)
        # A Batch keeps `index` on the host, where the cache reads it; it is copied only for a loss that needs it.
        index = batch.index.to(on_device.images.device, non_blocking=True) if self.distiller.uses_index else None
        with profiler_range("teacher"):
            return StepInput(on_device, index, self._staged.fetch(on_device))

    def compute(self, inputs: Iterable[StepInput], count: int, weights: LossWeights) -> StepValues:
        """Make one update. All work is that of the device: no value depends on the host but those of `weights`.

        Args:
            inputs: Inputs of each micro-batch.
            count: Number of micro-batches.
            weights: Temperature and loss weights; scalar tensors if they change and the call is captured.

        Returns:
            The values for the guard.

        Raises:
            UserError: If a trained parameter has no gradient.
        """
        accelerator, module = self.accelerator, self.train_state.module
        for number, micro_batch in enumerate(inputs, 1):
            with nullcontext() if number == count else accelerator.no_sync(module):
                with accelerator.autocast():
                    output = self.forward(micro_batch, weights)
                with profiler_range("backward"):
                    self.guard.backward(output, weight=1 / count)
            with profiler_range("logging"):
                self.train_state.meters.update(output, micro_batch.batch.labels)
        with profiler_range("optimizer"):
            self._update()
        return self.guard.take()

    def forward(self, inputs: StepInput, weights: LossWeights) -> DistillerOutput:
        """Run the teacher and the distiller for one micro-batch, under the caller's autocast."""
        batch = inputs.batch
        with profiler_range("teacher"):
            target = self._staged.finish(batch, inputs.fetched)
        output: DistillerOutput = self.train_state.module(batch.images, target, batch.labels, weights, index=inputs.index)
        return output

    def _update(self) -> None:
        """Apply the gradients, unless one of them is not finite."""
        accelerator, train_state = self.accelerator, self.train_state
        optimizer, scaler = train_state.optimizer.optimizer, accelerator.scaler
        _refuse_idle_parameters(self.guard.without_gradient())
        if self.clip_norm is not None:
            accelerator.unscale_gradients(train_state.optimizer)
        norm = self.guard.gradient_norm()
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(train_state.module.parameters(), self.clip_norm, norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)


class _Fetched:
    """Teacher source of a user, all of which may need the host: its output is fetched, and nothing is left to compute."""

    def __init__(self, source: TeacherSource, accelerator: Accelerator) -> None:
        self._source, self._accelerator = source, accelerator
        self._has_logits, self._layers, self._members = False, list[str](), list[str]()

    def fetch(self, batch: Batch) -> tuple[Tensor, ...]:
        with self._accelerator.autocast():
            output = self._source(batch)
        self._has_logits, self._layers, self._members = output.logits is not None, list(output.features), list(output.members)
        logits = [] if output.logits is None else [output.logits]
        return (*logits, *output.features.values(), *output.members.values())

    def finish(self, batch: Batch, fetched: tuple[Tensor, ...]) -> TeacherOutput:
        logits, others = (fetched[0], fetched[1:]) if self._has_logits else (None, fetched)
        features, members = others[: len(self._layers)], others[len(self._layers) :]
        return TeacherOutput(
            logits, dict(zip(self._layers, features, strict=True)), dict(zip(self._members, members, strict=True))
        )


def _refuse_idle_parameters(idle: Sequence[str]) -> None:
    """Raise UserError for parameters without a gradient.

    With them, DDP's gradient exchange would hang, or the ranks' weights would differ.
    """
    if idle:
        more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
        setting = "distill" if all(name.startswith(("logit_loss.", "feature_losses.")) for name in idle) else "model.arch"
        raise UserError(
            f"{setting}: no gradient reaches {', '.join(idle[:5])}{more}; every trained parameter must take part in the loss: "
            "remove the idle layer, use it, or set requires_grad to False"
        )
