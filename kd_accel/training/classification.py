"""Metrics of a classifier from its prediction for each sample: in each class, over the classes, and of the confidence.

Input: labels and predictions of all held-out samples, in their order. Output: figures in float64, so that they are the same for
any number of processes. NumPy alone is used; nothing here runs in a training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

TOP = 5
"""Number of classes of the top-5 accuracy."""

CALIBRATION_BINS = 15
"""Number of bins of the calibration error, that of Guo et al."""


def classification_metrics(
    labels: np.ndarray, predicted: np.ndarray, scores: np.ndarray, label_ranks: np.ndarray, label_names: Sequence[str]
) -> dict[str, Any]:
    """Compute the metrics of an evaluation that need each sample's prediction.

    Args:
        labels: Classes, int64 [N]; samples without a label (-1) are not counted.
        predicted: Predicted classes, int64 [N].
        scores: Probabilities of the predicted classes, float [N].
        label_ranks: Number of classes that are ranked above the label, int64 [N].
        label_names: Class names, by label.

    Returns:
        `top5_accuracy` if there are more than five classes; `balanced_accuracy`; `calibration_error`; `per_class`, for each
        class by name its `samples` and `accuracy`, None without samples. Empty without labels.
    """
    labeled = labels >= 0
    if not labeled.any():
        return {}
    labels, is_correct = labels[labeled], (predicted == labels)[labeled]
    counts = np.bincount(labels, minlength=len(label_names))
    correct = np.bincount(labels[is_correct], minlength=len(label_names))
    top = {"top5_accuracy": float((label_ranks[labeled] < TOP).mean())} if len(label_names) > TOP else {}
    return {
        **top,
        "balanced_accuracy": balanced_accuracy(counts, correct),
        "calibration_error": calibration_error(scores[labeled], is_correct),
        "per_class": {
            name: {"samples": count, "accuracy": right / count if count else None}
            for name, count, right in zip(label_names, counts.tolist(), correct.tolist(), strict=True)
        },
    }


def balanced_accuracy(counts: np.ndarray, correct: np.ndarray) -> float:
    """Compute the mean of the accuracies of the classes that have samples, a fraction of 1.

    Args:
        counts: Number of samples of each class, int64 [C].
        correct: Number of those that are predicted correctly, int64 [C].

    References:
        Brodersen et al. 2010, The Balanced Accuracy and Its Posterior Distribution; with absent classes as in scikit-learn.
    """
    present = counts > 0
    return float((correct[present] / counts[present]).mean())


def calibration_error(scores: np.ndarray, is_correct: np.ndarray, *, bins: int = CALIBRATION_BINS) -> float:
    """Compute the expected calibration error: the mean distance between accuracy and confidence, a fraction of 1.

    The samples are divided into bins of equal width by their score, ((m - 1) / bins, m / bins]. The distances of the bins are
    weighted with their number of samples.

    Args:
        scores: Probabilities of the predicted classes, float [N].
        is_correct: Whether each prediction is correct, bool [N].
        bins: Number of bins.

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3.
    """
    confidences = scores.astype(np.float64)
    edges = np.arange(1, bins) / bins
    bin_of_sample = np.searchsorted(edges, confidences, side="left")
    confidence = np.bincount(bin_of_sample, weights=confidences, minlength=bins)
    correct = np.bincount(bin_of_sample, weights=is_correct, minlength=bins)
    return float(np.abs(correct - confidence).sum() / len(scores))
