"""Results by class: accuracy of each class, confusion of classes, and the most confident errors as pictures.

In: stored predictions of a finished run. Out: counts, and errors with PNG data. Samples without a label are left out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from kd_accel.errors import UserError
from kd_accel.training.prediction_file import FILE_NAME, StoredPredictions

_TOP = 5
_MAX_PIXELS = 96
"""Largest height and width of a picture on the page."""


@dataclass(frozen=True)
class ClassResults:
    """Results of a run by class.

    Attributes:
        names: Names of the classes.
        confusion: Number of samples by class (row) and predicted class (column), int64 [C, C].
    """

    names: Sequence[str]
    confusion: np.ndarray

    @property
    def samples(self) -> np.ndarray:
        """Number of samples of each class, int64 [C]."""
        return self.confusion.sum(1)

    @property
    def accuracies(self) -> list[float | None]:
        """Accuracy of each class, a fraction of 1; None without samples."""
        hits = self.confusion.diagonal().tolist()
        return [hit / total if total else None for hit, total in zip(hits, self.samples.tolist(), strict=True)]

    def most_frequent_confusions(self, number: int) -> list[tuple[str, str, int]]:
        """Return (class, predicted class, number of samples) of the most frequent errors, the most frequent first."""
        errors = self.confusion - np.diag(self.confusion.diagonal())
        order = np.argsort(-errors, axis=None, kind="stable")[:number]
        found = [(*divmod(int(flat), len(self.names)), int(errors.flat[flat])) for flat in order]
        return [(self.names[label], self.names[predicted], count) for label, predicted, count in found if count]


@dataclass(frozen=True)
class WorstError:
    """Misclassified sample.

    Attributes:
        index: Position in the source split.
        label: Name of its class.
        prediction: Name of the predicted class.
        score: Probability of the predicted class.
        teacher_prediction: Name of the class that the teacher predicts; None without a teacher.
        picture: PNG file as a data URI.
    """

    index: int
    label: str
    prediction: str
    score: float
    teacher_prediction: str | None
    picture: str


def class_results(stored: StoredPredictions, names: Sequence[str]) -> ClassResults | None:
    """Count the predictions by class; None if no sample has a label.

    Raises:
        UserError: If the file is of other classes.
    """
    predictions, total = stored.predictions, len(names)
    for classes in (predictions.labels, predictions.predicted, predictions.teacher_predicted):
        if classes is not None and len(classes) and not (classes.min() >= -1 and classes.max() < total):
            raise UserError(f"{FILE_NAME}: has more classes than summary.json of its run ({total}); evaluate the run again")
    has_label = (predictions.labels >= 0) & (predictions.predicted >= 0)
    if not has_label.any():
        return None
    flat = predictions.labels[has_label].astype(np.int64) * total + predictions.predicted[has_label]
    return ClassResults(names, np.bincount(flat, minlength=total * total).reshape(total, total))


def top5_accuracy(stored: StoredPredictions, *, num_classes: int) -> float | None:
    """Return the fraction of the samples whose label is among the five best classes; None up to five classes."""
    has_label = stored.predictions.labels >= 0
    if num_classes <= _TOP or not has_label.any():
        return None
    return float((stored.predictions.label_ranks[has_label] < _TOP).mean())


def worst_errors(stored: StoredPredictions, names: Sequence[str], number: int) -> Iterator[WorstError]:
    """Yield the most confident errors, the most confident first."""
    found = stored.predictions
    for row, image in zip(stored.error_rows[:number].tolist(), stored.error_images, strict=False):
        teacher = None if found.teacher_predicted is None else names[found.teacher_predicted[row]]
        label, predicted = names[found.labels[row]], names[found.predicted[row]]
        yield WorstError(int(found.index[row]), label, predicted, float(found.scores[row]), teacher, _data_uri(image))


def _data_uri(image: np.ndarray) -> str:
    """Return an image, uint8 [3, H, W], as a PNG data URI, made smaller if it is large."""
    picture, file = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), io.BytesIO()
    picture.thumbnail((_MAX_PIXELS, _MAX_PIXELS))
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
