"""`kd-accel predict`: classes of image files by the model of a finished run, with the preprocessing of its model card."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kd_accel.data.folders import quoted
from kd_accel.errors import UserError
from kd_accel.models.image_files import list_image_files, predict_files
from kd_accel.models.inference import choose_kernels, use_cpu_kernels
from kd_accel.models.predictor import Model, Prediction, load_model
from kd_accel.report.predictions import check_predictions_file, write_predictions


def run_predictions(
    run: Path, files: Sequence[str], *, top_k: int | None = None, batch_size: int = 256, out: Path | None = None
) -> None:
    """Predict the classes of image files, and print a line of JSON for each: `file`, `label`, `score`.

    Kernels are those of an evaluation with the default settings, so that scores agree with it.

    Args:
        run: Run directory.
        files: Paths of image files, and of directories, of which all images are used.
        top_k: Number of classes with their scores that are added to each line as `top`; None = none.
        batch_size: Number of images per forward.
        out: Parquet file for the predictions, which are also printed; None = no file.

    Raises:
        UserError: If an argument is not valid; at the end, if files could not be read.
    """
    if out is not None:
        check_predictions_file(out)
    if batch_size < 1:
        raise UserError(f"--batch_size: {batch_size} must be at least 1")
    choose_kernels()
    model = load_model(run)
    if top_k is not None and not 1 <= top_k <= len(model.class_names):
        raise UserError(f"--top_k: {top_k} must be from 1 to {len(model.class_names)}, the number of classes of the model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use_cpu_kernels(model.network, device)
    model.network.to(device)
    paths, notices = list_image_files(files)
    print(*notices, sep="\n", end="\n" if notices else "", file=sys.stderr, flush=True)
    predicted, unreadable = list[tuple[str, Prediction]](), list[str]()
    for path, result in predict_files(model, paths, batch_size=batch_size):
        if isinstance(result, str):
            unreadable.append(path)
            print(result, file=sys.stderr, flush=True)
        else:
            print(json.dumps(_line(path, result, top_k)), flush=True)
            predicted += [(path, result)] if out is not None else []
    if out is not None:
        write_predictions(out, [_table(predicted, model)], label_names={str(run): model.class_names})
    if unreadable:
        raise UserError(
            f"predict: {len(unreadable)} of {len(paths)} files cannot be read as images and have no prediction "
            f"({quoted(unreadable)}); restore them, or leave them out"
        )


def _line(file: str, prediction: Prediction, top_k: int | None) -> dict[str, object]:
    line: dict[str, object] = {"file": file, "label": prediction.label, "score": prediction.score}
    if top_k is None:
        return line
    best = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])[:top_k]
    return {**line, "top": [{"label": label, "score": score} for label, score in best]}


def _table(predicted: Sequence[tuple[str, Prediction]], model: Model) -> dict[str, object]:
    """Return the columns of the predictions, a row for each (file, prediction)."""
    probabilities = [list(prediction.probabilities.values()) for _, prediction in predicted]
    return {
        "file": [file for file, _ in predicted],
        "label": [prediction.label for _, prediction in predicted],
        "score": np.array([prediction.score for _, prediction in predicted], dtype=np.float32),
        "probabilities": np.array(probabilities, dtype=np.float32).reshape(len(predicted), len(model.class_names)),
    }
