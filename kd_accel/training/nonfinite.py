"""Detection of losses and gradients that are not finite, on the device and without synchronization.

A loss that is not finite makes every gradient NaN, and the gradient exchange spreads the NaN to all ranks. The optimizer's
fused kernel then skips the update, as it does for a loss scaler. The record of each step stays on the device until a line of
metrics or a checkpoint is due. There, a step that was not finite ends the training.

With fp16, finite losses with a gradient that is not finite are an overflow: the loss scaler skips the update and lowers its
scale. Such steps are only counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd_accel.data.unlabeled import sample_name
from kd_accel.distributed import gathered
from kd_accel.errors import UserError
from kd_accel.losses.distiller import DistillerOutput

_LISTED = 5
_OVERFLOW = "overflow"
_GRADIENT = "the gradient"


@dataclass(frozen=True)
class _Forward:
    """Values of one micro-batch, to be read if the step was not finite.

    Attributes:
        terms: Each loss term, scalars by term name.
        student: Largest magnitude of the student's logits of each sample, [B]; finite only if all of them are.
        teacher: The same for the teacher's logits; None without a teacher.
    """

    terms: dict[str, Tensor]
    student: Tensor
    teacher: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.terms.values(), self.student, *([] if self.teacher is None else [self.teacher])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> _Forward:
        """Return a record of other tensors, in the order of `tensors`."""
        terms = dict(zip(self.terms, tensors, strict=False))
        student, *teacher = tensors[len(terms) :]
        return _Forward(terms, student, teacher[0] if teacher else None)


@dataclass(frozen=True)
class StepValues:
    """Values of one optimizer step on the device, to be read if the step was not finite.

    Attributes:
        forwards: Values of each micro-batch.
        norms: Norm of each parameter's gradient after the exchange, [number of parameters].
    """

    forwards: tuple[_Forward, ...]
    norms: Tensor

    def packed(self) -> Tensor:
        """Return all values as one vector."""
        return torch.cat([tensor.flatten() for tensor in self._tensors])

    def unpacked(self, packed: Tensor) -> StepValues:
        """Return values of the same shapes from such a vector, without a copy."""
        own = self._tensors
        parts = packed.split([tensor.numel() for tensor in own])
        norms, *values = [part.view(tensor.shape) for part, tensor in zip(parts, own, strict=True)]
        forwards = []
        for forward in self.forwards:
            count = len(forward.tensors)
            forwards.append(forward.with_tensors(values[:count]))
            values = values[count:]
        return StepValues(tuple(forwards), norms)

    @property
    def _tensors(self) -> list[Tensor]:
        return [self.norms, *(tensor for forward in self.forwards for tensor in forward.tensors)]


@dataclass(frozen=True)
class _Step:
    """Record of one optimizer step.

    Attributes:
        number: Number of the step, from 1.
        indices: Positions of the samples of each micro-batch in their source split, int64 [B], on the host.
        values: Values on the device.
    """

    number: int
    indices: Sequence[Tensor]
    values: StepValues


class NonFiniteGuard:
    """Guard against steps that are not finite.

    In each step, call `backward` for each micro-batch, `gradient_norm` before the update, `take` after it, and `add` with its
    result; call `check` before a line of metrics or a checkpoint. `backward`, `gradient_norm` and `take` work on the device
    alone.

    Args:
        accelerator: The launch's `Accelerator`.
        module: The module, prepared by Accelerate.
        optimizer: The optimizer with a fused kernel, prepared by Accelerate.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizer: Any) -> None:
        self._accelerator = accelerator
        self._named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        self._is_bad = torch.zeros((), device=accelerator.device)
        if accelerator.scaler is None:
            # This is the interface between torch's GradScaler and fused optimizers: with these attributes, a fused kernel skips
            # the update if found_inf is 1. The kernel reads found_inf on the device, so the host does not synchronize.
            optimizer.optimizer.grad_scale, optimizer.optimizer.found_inf = None, self._is_bad
        self._forwards: list[_Forward] = []
        self._norms: Tensor | None = None
        self._steps: list[_Step] = []

    def backward(self, output: DistillerOutput, *, weight: float = 1.0) -> None:
        """Record one micro-batch, and run its backward pass; the gradient is NaN if the loss is not finite.

        Args:
            output: Output of the distiller.
            weight: Weight of the micro-batch in the loss of the step.
        """
        terms = {name: term.detach() for name, term in output.terms.items()}
        teacher = None if output.teacher_logits is None else _magnitude(output.teacher_logits)
        self._forwards.append(_Forward(terms, _magnitude(output.logits), teacher))
        scaler = self._accelerator.scaler
        loss = output.loss if scaler is None else scaler.scale(output.loss)
        # An infinite loss can have a finite gradient, which would be applied (cross-entropy of logits that are too far apart).
        # So the gradient that enters the backward pass is weight - 0 * loss. Accelerate's `backward` would also divide by 1.
        loss.backward(torch.rsub(output.loss.detach(), weight, alpha=0))

    def without_gradient(self) -> list[str]:
        """List the trained parameters without a gradient after the backward pass."""
        return [own_name(name) for name, weight in self._named if weight.grad is None]

    def gradient_norm(self) -> Tensor:
        """Compute the norm of all gradients after their exchange; if it is not finite, the update is skipped.

        Returns:
            The norm, a scalar on the device.
        """
        gradients = [weight.grad for _, weight in self._named if weight.grad is not None]
        self._norms = torch.stack(torch._foreach_norm(gradients))
        norm = torch.linalg.vector_norm(self._norms)
        # 0 * norm is NaN, thus not 0, if the norm is not finite.
        torch.ne(norm * 0, 0, out=self._is_bad)
        return norm

    def take(self) -> StepValues:
        """Return the values of the present step, and forget them."""
        assert self._norms is not None, "gradient_norm was not called"
        values = StepValues(tuple(self._forwards), self._norms)
        self.forget()
        return values

    def forget(self) -> None:
        """Forget the values of the present step."""
        self._forwards, self._norms = [], None

    def add(self, step: int, indices: Sequence[Tensor], values: StepValues) -> None:
        """Add the values of a step, which `check` will read.

        Args:
            step: Number of the step, from 1.
            indices: Positions of the samples of each micro-batch in their source split, int64 [B], on the host.
            values: Values of the step.
        """
        self._steps.append(_Step(step, indices, values))

    def check(self) -> int:
        """Check the steps since the last call, which synchronizes the device. Every rank must call it.

        Returns:
            The number of fp16 overflows.

        Raises:
            UserError: If a step was not finite for another reason. It is raised on all ranks, and the message names the first
                such step, its loss term or parameter, rank and samples.
        """
        steps, self._steps = self._steps, []
        is_finite = torch.stack([step.values.norms for step in steps]).isfinite().all(1).tolist() if steps else []
        bad = [step for step, is_fine in zip(steps, is_finite, strict=True) if not is_fine]
        # The norms are the same on all ranks, so all ranks return here, or none.
        if not bad:
            return 0
        for step, *causes in zip(bad, *gathered([[self._cause(step) for step in bad]]), strict=True):
            if set(causes) != {_OVERFLOW}:
                raise diverged(f"{_first_of(causes)} at step {step.number}")
        return len(bad)

    def _cause(self, step: _Step) -> str:
        """Describe what was not finite in a step on this rank."""
        rank = self._accelerator.process_index
        for forward, index in zip(step.values.forwards, step.indices, strict=True):
            for name, term in forward.terms.items():
                if not term.isfinite():
                    return f"the loss term {name} is not finite on rank {rank} ({_samples_of(forward, index)})"
        if self._accelerator.scaler is not None:
            return _OVERFLOW
        name = self._named[int((~step.values.norms.isfinite()).int().argmax())][0]
        return f"{_GRADIENT} of {own_name(name)} is not finite (rank {rank} had {_listed(torch.cat(list(step.indices)))})"


def diverged(what: str) -> UserError:
    """Create the error of a training that has diverged. what: The value that is not finite, with step and samples."""
    return UserError(
        f"{what}: the training has diverged; lower optim.lr, set optim.clip_norm, or use train.precision float32. "
        "Checkpoints of earlier steps are intact"
    )


def own_name(name: str) -> str:
    """Return the name of a parameter as in the user's model, without the prefixes of DDP and the distiller."""
    return name.removeprefix("module.").removeprefix("student.")


def _first_of(causes: Sequence[str]) -> str:
    """Join the causes of all ranks. If a loss term is among them, the gradients are left out: they only follow from it."""
    terms = [cause for cause in causes if not cause.startswith((_OVERFLOW, _GRADIENT))]
    return "; ".join(terms[:_LISTED] or causes[:_LISTED])


def _samples_of(forward: _Forward, index: Tensor) -> str:
    """List the samples whose teacher's or student's logits are not finite, or all samples if all logits are finite."""
    for whose, magnitude in (("teacher", forward.teacher), ("student", forward.student)):
        if magnitude is not None and not magnitude.isfinite().all():
            return f"the {whose}'s logits of {_listed(index[~magnitude.isfinite().cpu()])}"
    return _listed(index)


def _magnitude(logits: Tensor) -> Tensor:
    """Return the largest magnitude of the logits [B, C] of each sample, NaN if one of them is NaN, [B]."""
    magnitude: Tensor = torch.linalg.vector_norm(logits.detach(), ord=torch.inf, dim=1)
    return magnitude


def _listed(index: Tensor) -> str:
    shown = ", ".join(map(sample_name, index[:_LISTED].tolist()))
    if len(index) == 1:
        return f"sample {shown}"
    return f"samples {shown}{f', ... {len(index)} in all' if len(index) > _LISTED else ''}"
