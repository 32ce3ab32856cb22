"""Results by class against counts by hand, and pictures of errors."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from kd_accel.errors import UserError
from kd_accel.report.classes import class_results, top5_accuracy, worst_errors
from kd_accel.training.prediction_file import StoredPredictions
from tests.report.runs import write_predictions

NAMES = ["cat", "dog", "fox"]
LABELS, PREDICTED = [0, 0, 1, 1, 1, -1], [0, 1, 0, 0, 1, 2]


def test_confusion_and_accuracy(tmp_path):
    found = class_results(write_predictions(tmp_path, labels=LABELS, predicted=PREDICTED), NAMES)
    assert found.confusion.tolist() == [[1, 1, 0], [2, 1, 0], [0, 0, 0]]
    assert found.accuracies == [0.5, 1 / 3, None] and found.samples.tolist() == [2, 3, 0]
    assert found.most_frequent_confusions(9) == [("dog", "cat", 2), ("cat", "dog", 1)]
    assert found.most_frequent_confusions(1) == [("dog", "cat", 2)]


def test_samples_without_labels_have_no_results(tmp_path):
    stored = write_predictions(tmp_path, labels=[-1, -1], predicted=[0, 1])
    assert class_results(stored, NAMES) is None and top5_accuracy(stored, num_classes=9) is None


@pytest.mark.parametrize("changes", [{"labels": [3]}, {"predicted": [3]}, {"teacher": [9]}])
def test_predictions_of_other_classes_are_refused(tmp_path, changes):
    stored = write_predictions(tmp_path, **{"labels": [0], "predicted": [0], **changes})
    with pytest.raises(UserError, match="predictions.safetensors: has more classes than summary.json of its run .3."):
        class_results(stored, NAMES)


def test_top5_counts_labels_among_the_best_five(tmp_path):
    stored = write_predictions(tmp_path, labels=[0, 1, 2, -1], predicted=[0, 0, 0, 0], ranks=[0, 4, 5, 0])
    assert top5_accuracy(stored, num_classes=6) == pytest.approx(2 / 3) and top5_accuracy(stored, num_classes=5) is None


def test_errors_are_pictures_in_the_order_of_their_scores(tmp_path):
    stored = write_predictions(tmp_path, labels=LABELS, predicted=PREDICTED, teacher=[0, 0, 0, 1, 1, 2])
    errors = list(worst_errors(stored, NAMES, 2))
    assert [(each.index, each.label, each.prediction, each.teacher_prediction) for each in errors] == [
        (103, "dog", "cat", "dog"),
        (102, "dog", "cat", "cat"),
    ]
    assert [round(each.score, 3) for each in errors] == [0.74, 0.66]
    prefix, _, data = errors[0].picture.partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert prefix == "data:image/png;base64" and picture.size == (3, 2) and picture.getpixel((2, 1)) == (103, 103, 103)


def test_large_pictures_are_made_smaller(tmp_path):
    stored = write_predictions(tmp_path, labels=[0], predicted=[1])
    large = StoredPredictions(stored.predictions, stored.error_rows, np.zeros((1, 3, 400, 200), np.uint8))
    (error,) = worst_errors(large, NAMES, 16)
    assert Image.open(io.BytesIO(base64.b64decode(error.picture.partition(",")[2]))).size == (48, 96)
