"""Predictions for image files, of which some may be unreadable, and for all images of directories.

Input: names of files and directories, and a `Model`. Output: for each file its prediction, or the reason why it has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kd_accel.data.folders import read_images
from kd_accel.errors import UserError
from kd_accel.models.predictor import Model, Prediction

_FIELD = "predict: "


def list_image_files(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """List image files, with all images below each directory in its place.

    Args:
        names: Paths of files, which need not exist, and of directories.

    Returns:
        (paths that begin as the names do, one line for each kind of files of a directory that are left out).

    Raises:
        UserError: If a directory has no images.
    """
    paths: list[str] = []
    notices: list[str] = []
    for name in names:
        if not os.path.isdir(name):  # noqa: PTH112  (raises no error for a name that is too long)
            paths.append(name)
            continue
        try:
            found, left_out = read_images(Path(name))
        except UserError as error:
            raise UserError(_of_predict(str(error))) from None
        root = os.path.abspath(name)  # noqa: PTH100  (links are not resolved, as in read_images)
        paths += [os.path.join(name, os.path.relpath(path, root)) for path in found]  # noqa: PTH118
        notices += map(_of_predict, left_out)
    return paths, notices


def _of_predict(message: str) -> str:
    """Return a message about a source as one about the files of a prediction."""
    return message.replace("data.source: ", _FIELD)


def predict_files(model: Model, paths: Sequence[str], *, batch_size: int) -> Iterator[tuple[str, Prediction | str]]:
    """Yield each file with its prediction, or with a line that names it and the reason why it cannot be read.

    Of a batch, the unreadable files come first.

    Args:
        model: The model.
        paths: Paths of image files.
        batch_size: Number of files of which the readable ones are one forward.
    """
    for start in range(0, len(paths), batch_size):
        read: list[tuple[str, np.ndarray]] = []
        for path in paths[start : start + batch_size]:
            try:
                read.append((path, model.pixels(path)))
            except ValueError as error:
                yield path, f"{_FIELD}{str(error).removeprefix('images: ')}"
        predictions = model.predict_pixels([pixels for _, pixels in read]) if read else []
        yield from zip((path for path, _ in read), predictions, strict=True)
