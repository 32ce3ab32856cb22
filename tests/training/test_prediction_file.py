"""The file of a run's predictions: what is written is read, the errors are the most confident ones, and damage is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_accel.errors import UserError
from kd_accel.training.prediction_file import FILE_NAME, load_predictions, save_predictions, with_errors
from kd_accel.training.predictions import Predictions

LABELS = [0, 1, 2, -1, 1, 0]
PREDICTED = [0, 2, 1, 1, 1, 2]
SCORES = [0.9, 0.5, 0.8, 0.99, 0.7, 0.8]


def predictions(**changes):
    columns = {
        "index": np.array([10, 11, 12, 13, 14, 15]),
        "labels": np.array(LABELS),
        "predicted": np.array(PREDICTED),
        "scores": np.array(SCORES, dtype=np.float32),
        "label_ranks": np.array([0, 1, 2, 0, 0, 1]),
        "teacher_predicted": np.array([0, 1, 2, 0, 1, 0]),
        "probabilities": None,
    }
    return Predictions(**{**columns, **changes})


def pixels(samples):
    """Return images whose pixels are the index of the sample, [n, 2, 3, 3]."""
    return np.broadcast_to(samples[:, None, None, None], (len(samples), 2, 3, 3)).astype(np.uint8)


def test_errors_are_the_most_confident_ones_among_labeled_samples():
    stored = with_errors(predictions(), pixels)
    assert stored.error_rows.tolist() == [2, 5, 1], "of equal scores the first sample is first"
    assert stored.error_images.shape == (3, 3, 2, 3)
    assert stored.error_images[:, 0, 0, 0].tolist() == [12, 15, 11]


def test_at_most_32_errors_have_images():
    many = predictions(
        index=np.arange(50),
        labels=np.zeros(50, int),
        predicted=np.ones(50, int),
        scores=np.linspace(0, 1, 50, dtype=np.float32),
    )
    assert with_errors(many, pixels).error_rows.tolist() == list(range(49, 17, -1))


@pytest.mark.parametrize("teacher", [None, np.array([0, 1, 2, 0, 1, 0])], ids=["without_teacher", "with_teacher"])
def test_what_is_written_is_read(tmp_path, teacher):
    stored = with_errors(predictions(teacher_predicted=teacher), pixels)
    save_predictions(tmp_path, stored)
    loaded = load_predictions(tmp_path)
    for name, value in vars(stored.predictions).items():
        other = getattr(loaded.predictions, name)
        assert (value is None and other is None) or (value.dtype == other.dtype and value.tolist() == other.tolist()), name
    assert loaded.error_rows.tolist() == stored.error_rows.tolist()
    assert np.array_equal(loaded.error_images, stored.error_images)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_run_without_errors_has_no_images(tmp_path):
    save_predictions(tmp_path, with_errors(predictions(predicted=np.array(LABELS)), pixels))
    assert load_predictions(tmp_path).error_images.shape == (0, 3, 2, 3)


def test_a_run_of_an_earlier_version_has_no_file(tmp_path):
    assert load_predictions(tmp_path) is None


DAMAGE = {
    "cut": lambda tensors: None,
    "missing": lambda tensors: tensors.pop("score"),
    "shorter": lambda tensors: tensors.update(label=tensors["label"][:3]),
    "type": lambda tensors: tensors.update(score=tensors["label"].clone()),
    "rows": lambda tensors: tensors.update(error_rows=torch.tensor([0, 1, 6])),
    "images": lambda tensors: tensors.update(error_images=tensors["error_images"][:, :2].contiguous()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(tmp_path, name):
    save_predictions(tmp_path, with_errors(predictions(), pixels))
    path = tmp_path / FILE_NAME
    tensors = load_file(path)
    DAMAGE[name](tensors)
    save_file(tensors, path)
    if name == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="predictions.safetensors: is damaged"):
        load_predictions(tmp_path)
