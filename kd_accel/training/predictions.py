"""Predictions of an evaluation: one for each held-out sample, in the order of the samples, for any number of processes.

Input: the batches of `evaluate` with their logits, on each rank those of its share. Output: `Predictions` of all ranks.
The evaluations between the epochs of a training record none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_accel.distributed import gathered
from kd_accel.types import Batch


@dataclass(frozen=True)
class Predictions:
    """Predictions for held-out samples.

    Attributes:
        index: Position of each sample in its source split, int64 [N].
        labels: Classes, int64 [N]; -1 = no label.
        predicted: Predicted classes, int64 [N].
        scores: Probabilities of the predicted classes, float32 [N].
        label_ranks: Number of classes that are ranked above the label, int64 [N]; not defined without a label.
        teacher_predicted: Classes that the teacher predicts, int64 [N]; None without a teacher.
        probabilities: Probabilities of all classes, float32 [N, C]; None if they were not kept.
    """

    index: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray
    label_ranks: np.ndarray
    teacher_predicted: np.ndarray | None
    probabilities: np.ndarray | None


class PredictionRecorder:
    """Recorder of the predictions of one rank, to be passed to `evaluate`.

    Args:
        keeps_probabilities: Whether the probabilities of all classes are kept, in host memory.
    """

    def __init__(self, *, keeps_probabilities: bool) -> None:
        self._keeps_probabilities = keeps_probabilities
        self._columns: dict[str, list[np.ndarray]] = {}

    def __call__(self, batch: Batch, logits: Tensor, teacher_logits: Tensor | None) -> None:
        """Record a batch.

        Args:
            batch: The batch, on the host.
            logits: Logits, float32 [B, C].
            teacher_logits: The teacher's logits [B, C]; None without a teacher.
        """
        probabilities, predicted = logits.softmax(1), logits.argmax(1)
        self._add(
            index=batch.index,
            labels=batch.labels,
            predicted=predicted,
            scores=probabilities.gather(1, predicted[:, None])[:, 0],
            label_ranks=label_ranks(logits, batch.labels.to(logits.device)),
        )
        if teacher_logits is not None:
            self._add(teacher_predicted=teacher_logits.argmax(1))
        if self._keeps_probabilities:
            self._add(probabilities=probabilities)

    def gather(self) -> Predictions:
        """Return the predictions of all ranks, in the order of the samples: that of the ranks. Every rank must call it."""
        own = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        # A rank without samples has no columns.
        ranks = [columns for columns in gathered([own]) if columns]
        columns: dict[str, Any] = {name: np.concatenate([rank[name] for rank in ranks]) for name in ranks[0]}
        return Predictions(**{"teacher_predicted": None, "probabilities": None, **columns})

    def _add(self, **columns: Tensor) -> None:
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values.cpu().numpy())


def label_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the classes that are ranked above the label, int64 [B]; of equal logits the first class is ranked higher.

    A logit that is not a number counts as ranked above all others, so that a label is never found by it.

    Args:
        logits: Logits [B, C].
        labels: Classes, int64 [B]; the result for a sample without a label (-1) has no meaning.
    """
    column = labels.clamp(min=0)[:, None]
    own = logits.gather(1, column)
    is_not_before = torch.arange(logits.shape[1], device=logits.device) >= column
    return (~((logits < own) | ((logits == own) & is_not_before))).sum(1)
