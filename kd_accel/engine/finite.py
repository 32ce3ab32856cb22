"""Losses and gradients that are not finite: seen on the device, left out of the update there, told where metrics are read.

No step waits to know. A term that is not finite makes the whole gradient so, and the ranks' exchange of gradients tells all of
them. The optimizer's kernel then leaves weights and momentum alone, as it does for a loss scaler. What was seen stays on the
device until a line of metrics or a checkpoint is due.

Under fp16 a gradient that is not finite behind losses that are is the loss scaler's business: it leaves the step out and
lowers its scale. Such steps are counted, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd_accel.engine.setup import gathered
from kd_accel.types import LossTerms, Signals, StudentOutput, UserError

_LISTED = 5
_NAMES = {"hard": "loss_hard", "response": "loss_response", "feature": "loss_feature"}


@dataclass(frozen=True)
class _Forward:
    """Which numbers of one micro-batch are finite. terms: bool by name. student, teacher: bool [B], of the logits."""

    rows: Tensor
    terms: dict[str, Tensor]
    student: Tensor
    teacher: Tensor | None


@dataclass(frozen=True)
class _Step:
    """norms: of the gradients of all parameters after the exchange, [P]."""

    number: int
    forwards: list[_Forward]
    norms: Tensor


@dataclass(frozen=True)
class Seen:
    """What has become of the steps since the last look. streak: steps left out in a row, up to the last one."""

    counts: dict[str, int]
    notices: list[str]
    streak: int


class FiniteWatch:
    """Around the parts of each optimizer step: `begin`, `watched` for each micro-batch, `gradient_norm`, update, `settle`."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: Any,
        *,
        average: nn.Module | None = None,
        may_skip: int = 0,
    ) -> None:
        """optimizer: as prepared by Accelerate. may_skip: how many steps in a row may be left out before the training stops."""
        self._accelerator, self._may_skip = accelerator, may_skip
        self._named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        self._is_bad = torch.zeros((), device=accelerator.device)
        if accelerator.scaler is None:
            optimizer.optimizer.grad_scale, optimizer.optimizer.found_inf = None, self._is_bad  # read by the fused kernels
        self._guarded = _what_forwards_change(module, average) if may_skip else []
        self._before: list[Tensor] = []
        self._forwards: list[_Forward] = []
        self._steps: list[_Step] = []

    def begin(self) -> None:
        self._forwards = []
        self._before = [tensor.clone() for tensor in self._guarded]

    def watched(self, terms: LossTerms, output: StudentOutput, answer: Signals, rows: Tensor) -> Tensor:
        """The loss to go backward from: the total, its gradient not finite either where it is not. rows: [B], on the host."""
        named = {name: getattr(terms, name) for name in _NAMES}
        self._forwards.append(
            _Forward(
                rows,
                {name: value.detach().isfinite() for name, value in named.items() if value is not None},
                output.logits.detach().isfinite().all(1),
                None if answer.logits is None else answer.logits.isfinite().all(1),
            )
        )
        return terms.total * torch.where(terms.total.detach().isfinite(), 1.0, torch.nan)

    def without_gradient(self) -> list[str]:
        """Trained parameters that the backward has not reached."""
        return [own_name(name) for name, weight in self._named if weight.grad is None]

    def gradient_norm(self, step: int) -> Tensor:
        """Of all parameters together, after the exchange; it decides whether the update of optimizer step `step` is made."""
        gradients = [weight.grad for _, weight in self._named if weight.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = torch.linalg.vector_norm(norms)
        self._is_bad.copy_(~norm.isfinite())
        self._steps.append(_Step(step, self._forwards, norms))
        return norm

    def settle(self) -> None:
        """After the update: a step that was left out leaves no trace in BatchNorm's statistics and in the moving average."""
        for now, before in zip(self._guarded, self._before, strict=True):
            now.copy_(torch.where(self._is_bad > 0, before, now))

    def look(self, *, streak: int) -> Seen:
        """Read what was seen since the last look. streak: of that look. Every rank must call it; this waits for the device.

        Raises UserError, on all ranks alike, that names step, term, rank and rows once more steps in a row were left out than
        may be.
        """
        steps, self._steps = self._steps, []
        skipped = overflowed = 0
        notices = []
        for number, words in self._causes(steps).items():
            if not words:
                streak = 0
            elif set(words) == {_OVERFLOW}:
                overflowed += 1
            else:
                skipped, streak = skipped + 1, streak + 1
                told = f"{_first_of(words)} at step {number}"
                if streak > self._may_skip:
                    raise diverged(told if streak == 1 else f"{told}, step {streak} of such steps in a row")
                notices.append(f"{told}: the step was left out")
        counts = {"skipped_steps": skipped} if self._may_skip else {}
        if self._accelerator.scaler is not None:
            counts["overflowed_steps"] = overflowed
        return Seen(counts, notices, streak)

    def _causes(self, steps: Sequence[_Step]) -> dict[int, list[str]]:
        """{number of the step: what each rank saw, nothing where all was well}.

        The norms are the same on all ranks, so these need an exchange only where something went wrong.
        """
        causes: dict[int, list[str]] = {step.number: [] for step in steps}
        if steps and not torch.stack([step.norms for step in steps]).isfinite().all():
            for number, words in gathered([(step.number, self._cause(step)) for step in steps if not _is_finite(step)]):
                causes[number].append(words)
        return causes

    def _cause(self, step: _Step) -> str:
        """What this rank saw of a step that went wrong."""
        rank = self._accelerator.process_index
        for forward in step.forwards:
            for name, is_finite in forward.terms.items():
                if not is_finite:
                    return f"{_NAMES[name]} is not finite on rank {rank} ({_rows_of(forward)})"
        if self._accelerator.scaler is not None:
            return _OVERFLOW
        name = self._named[int((~step.norms.isfinite()).int().argmax())][0]
        rows = torch.cat([forward.rows for forward in step.forwards])
        return f"{_GRADIENT} of {own_name(name)} is not finite (rank {rank} had {_listed(rows)})"


_OVERFLOW = "overflow"
_GRADIENT = "the gradient"


def diverged(what: str) -> UserError:
    return UserError(
        f"{what}: the training has diverged; lower optim.lr, set optim.clip_norm, use train.precision 'no', or let such steps "
        "be left out (train.skip_non_finite). The last checkpoint is untouched"
    )


def own_name(name: str) -> str:
    """Of a parameter, as the user's model has it."""
    return name.removeprefix("module.").removeprefix("student.")


def _what_forwards_change(module: nn.Module, average: nn.Module | None) -> list[Tensor]:
    return [*module.buffers(), *(average.state_dict().values() if average is not None else ())]


def _is_finite(step: _Step) -> bool:
    return bool(step.norms.isfinite().all())


def _first_of(words: Sequence[str]) -> str:
    """Of what the ranks saw: a term before an overflow, or before the gradient that it made so on all ranks."""
    terms = [word for word in words if not word.startswith((_OVERFLOW, _GRADIENT))]
    return "; ".join(terms[:_LISTED] or words[:_LISTED])


def _rows_of(forward: _Forward) -> str:
    """Those with logits that are not finite, of the teacher or of the student; where there are none, all."""
    for whose, is_finite in (("teacher", forward.teacher), ("student", forward.student)):
        if is_finite is not None and not is_finite.all():
            return f"the {whose}'s logits of {_listed(forward.rows[~is_finite.cpu()])}"
    return _listed(forward.rows)


def _listed(rows: Tensor) -> str:
    shown = ", ".join(str(row) for row in rows[:_LISTED].tolist())
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}{f', ... {len(rows)} in all' if len(rows) > _LISTED else ''}"
