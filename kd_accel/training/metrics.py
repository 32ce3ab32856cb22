"""Means over the steps since the last line of metrics, summed on the device and read only when a line is written.

Sums are float64, so that a mean does not depend on how many steps it spans; one reduction per line brings the ranks together.
A checkpoint may fall between two lines: it keeps each rank's sums, and the line after a resume is the same as without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel.types import LossTerms

_NAMES = ("samples", "loss", "loss_hard", "loss_response", "loss_feature", "accuracy", "agreement")
_OVERFLOWED = "overflowed_steps"


class Meters:
    """Running sums over samples, one sample of float64 on the device of the values that come in."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_NAMES) + 1, dtype=torch.float64, device=device)
        self._seen: set[str] = {"samples", "loss", "loss_hard", "accuracy"}

    def update(
        self,
        terms: LossTerms,
        logits_BC: Tensor,
        labels: Tensor,
        *,
        teacher_logits_BC: Tensor | None = None,
    ) -> None:
        """Add one micro-batch. No value is read here, so nothing waits for the device."""
        answer = logits_BC.detach().argmax(1)
        agreement = None
        if teacher_logits_BC is not None:
            agreement = (answer == teacher_logits_BC.argmax(1)).double().mean()
        values = {
            "loss": terms.total.detach(),
            "loss_hard": terms.hard.detach(),
            "loss_response": None if terms.response is None else terms.response.detach(),
            "loss_feature": None if terms.feature is None else terms.feature.detach(),
            "accuracy": (answer == labels).double().mean(),
            "agreement": agreement,
        }
        present = {name: value for name, value in values.items() if value is not None}
        self._seen.update(present)
        zero = torch.zeros((), dtype=torch.float64, device=self._sums.device)
        one = torch.ones((), dtype=torch.float64, device=self._sums.device)
        means = torch.stack([one, *(present.get(name, zero).double() for name in _NAMES[1:])])
        self._sums[: len(_NAMES)].add_(means, alpha=len(labels))

    def count_overflows(self, number: int) -> None:
        """Count steps that the loss scaler has left out; a line has their sum over all ranks."""
        self._seen.add(_OVERFLOWED)
        self._sums[-1] += number

    @property
    def sums(self) -> Tensor:
        """Float64 vector on the device, to be reduced over the ranks."""
        return self._sums.clone()

    def restore(self, sums: list[float], names: list[str]) -> None:
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))
        self._seen.update(names)

    @property
    def names(self) -> list[str]:
        return sorted(self._seen)

    def read(self, reduced_sums: Tensor) -> dict[str, float]:
        """Compute the means and the count from sums over all ranks, and start again from zero."""
        sums = dict(zip((*_NAMES, _OVERFLOWED), reduced_sums.tolist(), strict=True))
        self._sums.zero_()
        means = {name: sums[name] / sums["samples"] for name in _NAMES[1:] if name in self._seen}
        return means | ({_OVERFLOWED: int(sums[_OVERFLOWED])} if _OVERFLOWED in self._seen else {})
