"""Recorded predictions: ranks of labels with ties and values that are not numbers, and the columns of several batches."""

import numpy as np
import pytest
import torch

from kd_accel.training.predictions import PredictionRecorder, label_ranks
from kd_accel.types import Batch

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logits", "ranks"),
    [
        ([3.0, 1.0, 2.0], [0, 2, 1]),
        ([1.0, 1.0, 1.0], [0, 1, 2]),
        ([1.0, 2.0, 1.0], [1, 0, 2]),
        ([INF, INF, 0.0], [0, 1, 2]),
        ([1.0, NAN, 0.0], [1, 3, 2]),
        ([NAN, NAN, NAN], [3, 3, 3]),
    ],
)
def test_ranks_of_labels(logits, ranks):
    rows = torch.tensor([logits] * 3)
    assert label_ranks(rows, torch.arange(3)).tolist() == ranks
    if not rows.isnan().any():
        assert label_ranks(rows, rows.argmax(1)).tolist() == [0, 0, 0]


def test_batches_are_joined_in_their_order():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 7, 4, generator=generator)
    labels, index = torch.tensor([0, 1, 2, 3, -1, 1, 0]), torch.arange(10, 17)
    recorder, small = PredictionRecorder(keeps_probabilities=True), PredictionRecorder(keeps_probabilities=False)
    for part in (slice(0, 4), slice(4, 7)):
        batch = Batch(torch.zeros(len(labels[part]), 3, 2, 2, dtype=torch.uint8), labels[part], index[part], 0)
        recorder(batch, logits[part], teacher[part])
        small(batch, logits[part], None)
    found, without = recorder.gather(), small.gather()
    assert found.index.tolist() == index.tolist() and found.labels.tolist() == labels.tolist()
    assert found.predicted.tolist() == logits.argmax(1).tolist()
    assert found.teacher_predicted.tolist() == teacher.argmax(1).tolist() != found.predicted.tolist()
    assert found.probabilities.dtype == found.scores.dtype == np.float32
    assert np.array_equal(found.probabilities, logits.softmax(1).numpy())
    assert np.array_equal(found.scores, found.probabilities.max(1))
    assert without.teacher_predicted is None and without.probabilities is None
    assert np.array_equal(without.label_ranks, found.label_ranks)
