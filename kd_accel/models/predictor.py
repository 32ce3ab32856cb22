"""A trained model for use: plain network, classes and preprocessing, from the files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from kd_accel.data.decode import decode, fit_array, fit_image
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import ModelCard, load_run_model


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Args:
        label: name of the class with the highest probability.
        score: its probability, in 0..1.
        probabilities: of every class, by name.
    """

    label: str
    score: float
    probabilities: dict[str, float]


class Model:
    """A trained classifier.

    Args:
        network: plain network, normalized images [B, 3, H, W] -> logits [B, C]; in evaluation mode.
        card: architecture, classes and preprocessing.
    """

    def __init__(self, network: nn.Module, card: ModelCard) -> None:
        self.network, self.card = network.eval(), card
        self._normalize = Normalize(card.mean, card.std)

    @property
    def class_names(self) -> list[str]:
        """Class names, by label."""
        return self.card.label_names

    @torch.no_grad()
    def predict(self, images: Sequence[Any], *, batch_size: int = 256) -> list[Prediction]:
        """Predict the class of images.

        Args:
            images: paths of image files, PIL images, or uint8 arrays [H, W, 3].
            batch_size: images per forward.

        Raises:
            TypeError: an image of another type.
            ValueError: a file cannot be decoded.
        """
        device = next(self.network.parameters()).device
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            pixels = np.stack([self._pixels(image) for image in images[start : start + batch_size]])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
            probabilities = self.network(self._normalize.to(device)(batch)).float().softmax(1)
            predictions += [self._prediction(values) for values in probabilities.tolist()]
        return predictions

    def _pixels(self, image: Any) -> np.ndarray:
        size = self.card.image_size
        if isinstance(image, str | Path):
            return decode(Path(image).read_bytes(), size)
        if isinstance(image, Image.Image):
            return fit_image(image, size)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
            return fit_array(image, size)
        raise TypeError(f"images: must be paths, PIL images or uint8 arrays [H, W, 3], not {type(image).__name__}")

    def _prediction(self, probabilities: list[float]) -> Prediction:
        by_name = dict(zip(self.class_names, probabilities, strict=True))
        label = max(by_name, key=lambda name: by_name[name])
        return Prediction(label, by_name[label], by_name)


def load_model(run: str | Path) -> Model:
    """Load the model of a finished run. Raises ValueError (`UserError`) if the directory holds none, or a damaged one."""
    network, card = load_run_model(Path(run), field="run")
    return Model(network, card)
