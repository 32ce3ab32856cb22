"""Metrics of a classifier against scikit-learn, the formulas of the papers, and values computed by hand."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from kd_accel.training.classification import balanced_accuracy, calibration_error, classification_metrics

NAMES = [f"class {number}" for number in range(8)]


def drawn(samples=300, classes=8, seed=0):
    """Return labels, of which class 5 has none, and logits that are right about half of the time."""
    generator = np.random.default_rng(seed)
    labels = generator.choice([0, 0, 0, 1, 2, 3, 4, 6, 7], samples)
    logits = generator.normal(size=(samples, classes))
    logits[np.arange(samples), labels] += 1.5
    return labels, logits


def metrics(labels, logits, names=NAMES):
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    own = logits[np.arange(len(labels)), labels]
    return classification_metrics(labels, logits.argmax(1), scores.max(1), (logits > own[:, None]).sum(1), names)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_metrics_equal_those_of_scikit_learn():
    labels, logits = drawn()
    result = metrics(labels, logits)
    assert list(result) == ["top5_accuracy", "balanced_accuracy", "calibration_error", "per_class"]
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)), abs=1e-15)
    assert result["top5_accuracy"] == top_k_accuracy_score(labels, logits, k=5, labels=range(8))
    assert 0.5 < result["top5_accuracy"] < 1
    for label, name in enumerate(NAMES):
        of_class = labels == label
        expected = (logits.argmax(1) == label)[of_class].mean() if of_class.any() else None
        assert result["per_class"][name] == {"samples": of_class.sum(), "accuracy": expected}
    assert result["per_class"]["class 5"] == {"samples": 0, "accuracy": None}


def test_balanced_accuracy_weights_the_classes_equally():
    assert balanced_accuracy(np.array([90, 10, 0]), np.array([90, 0, 0])) == 0.5


def test_calibration_error_is_that_of_the_paper():
    """Accuracy is above confidence in some bins and below it in others, so that the number of bins matters."""
    generator, expected = np.random.default_rng(1), 0.0
    scores = generator.random(500)
    is_correct = generator.random(500) < scores
    for number in range(15):
        of_bin = (scores > number / 15) & (scores <= (number + 1) / 15)
        if of_bin.any():
            expected += of_bin.mean() * abs(is_correct[of_bin].mean() - scores[of_bin].mean())
    assert calibration_error(scores, is_correct) == pytest.approx(expected, abs=1e-12)
    assert calibration_error(scores, is_correct, bins=10) < 0.95 * expected


@pytest.mark.parametrize(
    ("scores", "is_correct", "expected"),
    [
        ([0.9, 0.9, 0.9, 0.9], [True, True, True, False], 0.15),
        ([1.0, 1.0], [True, True], 0.0),
        # Opposite errors cancel in a bin (0.75 and 0.875 of four), but not in two.
        ([0.8, 0.9], [False, True], 0.35),
        ([0.5, 0.9], [False, True], (0.5 + 0.1) / 2),
        # A score on an edge belongs to the lower bin.
        ([0.5, 0.6], [False, True], 0.45),
    ],
)
def test_calibration_error_computed_by_hand(scores, is_correct, expected):
    bins = 2 if scores[0] == 0.8 else 8 if scores[1] == 0.6 else 15
    assert calibration_error(np.array(scores), np.array(is_correct), bins=bins) == pytest.approx(expected, abs=1e-12)


def test_scores_that_are_not_numbers_give_an_error_that_is_none():
    assert np.isnan(calibration_error(np.array([np.nan, 0.5], dtype=np.float32), np.array([False, True])))


def test_samples_without_a_label_are_not_counted():
    labels, logits = drawn()
    expected = metrics(labels, logits)
    some = np.concatenate([labels, [-1, -1]])
    ranks = (logits > logits[np.arange(len(labels)), labels][:, None]).sum(1)
    scores = np.exp(logits).max(1) / np.exp(logits).sum(1)
    result = classification_metrics(
        some, np.append(logits.argmax(1), [0, 1]), np.append(scores, [1, 1]), np.append(ranks, [0, 0]), NAMES
    )
    assert result == expected
    assert classification_metrics(some[-2:], some[-2:], scores[:2], ranks[:2], NAMES) == {}


def test_five_classes_have_no_top_5_accuracy():
    labels, logits = drawn(classes=8)
    kept = labels < 5
    result = metrics(labels[kept], logits[kept][:, :5], NAMES[:5])
    assert "top5_accuracy" not in result and len(result["per_class"]) == 5
