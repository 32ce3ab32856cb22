"""Training metrics as means since the last line of metrics, and metrics.jsonl.

Sums are float64 on the device and are read only for a line of metrics, with one reduction over the ranks. A checkpoint between
two lines holds each rank's sums, so that the next line is the same after a resume.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_accel.errors import UserError
from kd_accel.io.files import refused_by_disk
from kd_accel.losses.distiller import DistillerOutput
from kd_accel.training.nonfinite import diverged

_OVERFLOWED = "overflowed_steps"
_LABELED = "labeled"


class Meters:
    """Running sums over the samples since the last line of metrics, in one float64 vector on the device.

    Args:
        device: Device of the values to add.
        terms: Names of the loss terms, as `Distiller.term_names`.
        has_teacher: Whether the agreement with a teacher is measured.
        counts_overflows: Whether the steps that a loss scaler skips are counted.
        has_unlabeled: Whether some samples have no label. The accuracy is that of the labeled samples.
        has_mixed_labels: Whether labels are probabilities, for which no accuracy is measured.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        terms: Sequence[str],
        has_teacher: bool = False,
        counts_overflows: bool = False,
        has_unlabeled: bool = False,
        has_mixed_labels: bool = False,
    ) -> None:
        optional = (("accuracy", not has_mixed_labels), ("agreement", has_teacher), (_LABELED, has_unlabeled))
        self._means = ("samples", "loss", *terms, *(name for name, is_measured in optional if is_measured))
        self.names = (*self._means, *([_OVERFLOWED] if counts_overflows else []))
        self._sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._samples = 0

    def count_samples(self, number: int) -> None:
        """Add the number of samples of a step, which the host counts."""
        self._samples += number

    def update(self, output: DistillerOutput, labels: Tensor) -> None:
        """Add the sums of one micro-batch on the device, without synchronizing; `count_samples` adds their number.

        Args:
            output: Output of the distiller.
            labels: Class indices, int64 [B]; -1 = no label. Or mixed labels, float [B, C]; a row of zeros = no label.
        """
        # On a GPU the cost of logging is the number of its small kernels, so all losses and all counts are added at once.
        losses = torch.stack([output.loss, *output.terms.values()]).detach()
        self._sums[1 : 1 + len(losses)].add_(losses, alpha=len(labels))
        classes = [labels] if "accuracy" in self._means else []
        if "agreement" in self._means:
            assert output.teacher_logits is not None, "each teacher has logits"
            classes.append(output.teacher_logits.argmax(1))
        counts = [(torch.stack(classes) == output.logits.detach().argmax(1)).sum(1)] if classes else []
        if _LABELED in self._means:
            counts.append((labels.any(1) if labels.is_floating_point() else labels >= 0).sum(0, keepdim=True))
        if counts:
            self._sums[1 + len(losses) : len(self._means)].add_(torch.cat(counts) if len(counts) > 1 else counts[0])

    def count_overflows(self, number: int) -> None:
        """Add a number of steps that the loss scaler has skipped; a line of metrics has their sum over all ranks."""
        self._sums[-1] += number

    @property
    def sums(self) -> Tensor:
        """Copy of this rank's sums, float64 [len(names)]."""
        sums = self._sums.clone()
        sums[0] = self._samples
        return sums

    def restore(self, sums: Sequence[float]) -> None:
        """Load this rank's sums from a checkpoint."""
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))
        self._samples = int(sums[0])

    def read(self, reduced_sums: Tensor) -> dict[str, float]:
        """Compute means and counts from the sums of all ranks, and reset this rank's sums."""
        sums = dict(zip(self.names, reduced_sums.tolist(), strict=True))
        self._sums.zero_()
        self._samples = 0
        means = {name: sums[name] / sums["samples"] for name in self._means[1:]}
        if (labeled := means.pop(_LABELED, 1.0)) < 1:
            # The cross-entropy stays that of the loss, in which a sample without a label counts as 0.
            divisors = {"ce": 1.0, "accuracy": labeled}
            sums_of_labeled = {name: means.pop(name) for name in divisors if name in means}
            means |= {name: value / divisors[name] for name, value in sums_of_labeled.items()} if labeled else {}
        return means | ({_OVERFLOWED: int(sums[_OVERFLOWED])} if _OVERFLOWED in sums else {})


class Tracker(Protocol):
    """Protocol of an experiment tracker, to which metrics are sent in addition to the file."""

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """Log metrics at an optimizer step."""


class MetricsLog:
    """Log of metrics in metrics.jsonl, one JSON object per line, written by the main process.

    A resume truncates the file to the length that the checkpoint has recorded, so each step is logged once.

    Args:
        path: The file.
        is_main: Whether this is the main process; other ranks write nothing.
        trackers: Experiment trackers, to which the same metrics are sent.
    """

    def __init__(self, path: Path, *, is_main: bool, trackers: Sequence[Tracker] = ()) -> None:
        self._path, self._is_main, self._trackers = path, is_main, trackers

    def start(self, length_bytes: int) -> None:
        """Truncate the file before the first step.

        Args:
            length_bytes: The length that the checkpoint has recorded; 0 for a new run.

        Raises:
            UserError: If the file is shorter.
        """
        if not self._is_main:
            return
        with self._path.open("ab") as file:
            if file.tell() < length_bytes:
                raise UserError(
                    f"{self._path}: is shorter than the checkpoint has recorded ({file.tell()} of {length_bytes} bytes); "
                    "restore the file, or start from scratch in another run_dir"
                )
            file.truncate(length_bytes)

    def length_bytes(self) -> int:
        """Return the length of the file in bytes; 0 on other ranks than the main process."""
        return self._path.stat().st_size if self._is_main and self._path.exists() else 0

    def write(self, values: dict[str, Any]) -> None:
        """Append one line.

        Args:
            values: `step`, `epoch`, `split`, and the metrics by name.

        Raises:
            UserError: If a metric is not finite, or the file cannot be written.
        """
        _refuse_not_finite(values)
        if not self._is_main:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(refused_by_disk(error)) from None
        numbers = {key: value for key, value in values.items() if key not in ("split", "step")}
        for tracker in self._trackers:
            tracker.log({_axis_name(values["split"], key): value for key, value in numbers.items()}, step=values["step"])


def _axis_name(split: str, key: str) -> str:
    return key if key == "epoch" else f"{split}/{key}"


def _refuse_not_finite(values: dict[str, Any]) -> None:
    """Raise UserError for a metric of an evaluation that is not finite; training/nonfinite.py covers the training steps."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise diverged(f"{name} is {value} at step {values['step']} ({values['split']})")
