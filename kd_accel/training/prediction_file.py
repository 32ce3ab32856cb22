"""Predictions of a finished run for its test samples, with the images of its most confident errors: `predictions.safetensors`.

Reports and trackers read this file, which needs neither the data nor the model. Tensors: `index`, `label`, `prediction`,
`label_rank` int64 [N], `score` float32 [N], `teacher_prediction` int64 [N] where the run has a teacher; `error_rows` int64 [K]
and `error_images` uint8 [K, 3, H, W].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kd_accel.errors import UserError
from kd_accel.io.files import write_whole
from kd_accel.io.tensors import read_tensors
from kd_accel.training.predictions import Predictions

FILE_NAME = "predictions.safetensors"
_ERRORS = 32
_NAMES = {
    "index": "index",
    "label": "labels",
    "prediction": "predicted",
    "label_rank": "label_ranks",
    "score": "scores",
    "teacher_prediction": "teacher_predicted",
}


@dataclass(frozen=True)
class StoredPredictions:
    """Predictions of a finished run for its test samples.

    Attributes:
        predictions: One prediction for each sample, without the probabilities of all classes.
        error_rows: Rows of the most confident errors, the most confident first, int64 [K].
        error_images: Their images, uint8 [K, 3, H, W].
    """

    predictions: Predictions
    error_rows: np.ndarray
    error_images: np.ndarray


def with_errors(predictions: Predictions, pixels: Callable[[np.ndarray], np.ndarray]) -> StoredPredictions:
    """Choose the most confident errors, and read their images.

    Args:
        predictions: Predictions for labeled samples; samples without a label are not errors.
        pixels: Function from positions in the source split, int64 [K], to images, uint8 [K, H, W, 3].
    """
    is_wrong = (predictions.labels >= 0) & (predictions.predicted != predictions.labels)
    wrong = np.flatnonzero(is_wrong)
    rows = wrong[np.argsort(-predictions.scores[wrong], kind="stable")][:_ERRORS]
    return StoredPredictions(predictions, rows, pixels(predictions.index[rows]).transpose(0, 3, 1, 2))


def save_predictions(directory: Path, stored: StoredPredictions) -> None:
    """Write the file into a run directory, atomically. Raises UserError if it cannot be written."""
    columns = {name: getattr(stored.predictions, own) for name, own in _NAMES.items()}
    columns |= {"error_rows": stored.error_rows, "error_images": stored.error_images}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items() if column is not None}
    try:
        write_whole(directory / FILE_NAME, lambda path: save_file(tensors, path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{directory / FILE_NAME}: cannot be written ({error}); free disk space, then run the same command again, which "
            "only evaluates on the test samples"
        ) from None


def load_predictions(directory: Path) -> StoredPredictions | None:
    """Load the file of a run; None if the run has none, as those of earlier versions.

    Raises:
        UserError: If the file is damaged.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        columns = {name: tensor.numpy() for name, tensor in read_tensors(path).items()}
        values: dict[str, Any] = {own: columns.get(name) for name, own in _NAMES.items()}
        _check(columns)
        return StoredPredictions(Predictions(**values, probabilities=None), columns["error_rows"], columns["error_images"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it to leave out its part of a report") from None


def _check(columns: dict[str, np.ndarray]) -> None:
    """Raise ValueError if the columns do not fit together, KeyError if one is missing."""
    length = len(columns["index"])
    for name in _NAMES:
        if name != "teacher_prediction" or name in columns:
            column = columns[name]
            if column.shape != (length,) or (column.dtype.kind == "f") != (name == "score"):
                raise ValueError(f"{name} has shape {column.shape} and type {column.dtype}")
    rows, images = columns["error_rows"], columns["error_images"]
    if rows.ndim != 1 or rows.dtype.kind != "i" or not all(row in range(length) for row in rows.tolist()):
        raise ValueError(f"error_rows has shape {rows.shape} and type {rows.dtype}, for {length} samples")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (len(rows), 3):
        raise ValueError(f"error_images has shape {images.shape} and type {images.dtype}")
