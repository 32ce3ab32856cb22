"""Trained model for inference: the network, its classes and its preprocessing, loaded from the files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kd_accel.data.decode import Decoder, as_range
from kd_accel.data.wrapped import square_pixels
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import ModelCard, load_run_model


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        label: Name of the class with the highest probability.
        score: Probability of this class, in 0..1.
        probabilities: Probability of every class, by name.
    """

    label: str
    score: float
    probabilities: dict[str, float]


class Model:
    """Trained classifier with its preprocessing.

    Args:
        network: Network from normalized images [B, 3, S, S] to logits [B, C]; it is set to evaluation mode.
        card: Architecture, classes and preprocessing.

    Attributes:
        network: The network, which may be moved to another device.
        card: Architecture, classes and preprocessing.
    """

    def __init__(self, network: nn.Module, card: ModelCard) -> None:
        self.network, self.card = network.eval(), card
        self._normalize = Normalize(card.mean, card.std)
        self._decoder = Decoder(card.image_size, card.background, as_range(card.pixel_range), card.crop_pct)

    @property
    def class_names(self) -> list[str]:
        """Class names, by label."""
        return self.card.label_names

    @torch.no_grad()
    def predict(self, images: Sequence[Any] | np.ndarray | Tensor, *, batch_size: int = 256) -> list[Prediction]:
        """Predict the classes of images, after resizing them as in training.

        Args:
            images: Sequence of paths of image files, PIL images, or uint8 arrays or tensors [H, W, 3] or [3, H, W]. An array or
                tensor with a leading batch axis is a sequence of images.
            batch_size: Number of images per forward.

        Returns:
            One prediction per image, in the same order.

        Raises:
            TypeError: If `images` is not a sequence, or an image has another type.
            ValueError: If a file cannot be read or decoded, or `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} must be at least 1")
        is_single = isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) == 3
        if is_single or not hasattr(images, "__len__"):
            raise TypeError(f"images: must be a list of images, not {type(images).__name__}; put a single image in a list")
        device = next(self.network.parameters()).device
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            pixels = np.stack([self._pixels(image) for image in images[start : start + batch_size]])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
            probabilities = self.network(self._normalize.to(device)(batch)).float().softmax(1)
            predictions += [self._prediction(values) for values in probabilities.tolist()]
        return predictions

    def _pixels(self, image: Any) -> np.ndarray:
        """Return the resized image, uint8 [S, S, 3]."""
        if not isinstance(image, str | Path):
            return square_pixels(image, self._decoder, where="images")
        try:
            return self._decoder.decode(Path(image).read_bytes())
        except OSError as error:
            raise ValueError(f"images: cannot read {image} ({error.strerror}); check the path") from None
        except ValueError as error:
            raise ValueError(f"images: cannot decode {image} ({error}); use another file") from None

    def _prediction(self, probabilities: list[float]) -> Prediction:
        by_name = dict(zip(self.class_names, probabilities, strict=True))
        label = max(by_name, key=lambda name: by_name[name])
        return Prediction(label, by_name[label], by_name)


def load_model(run: str | Path) -> Model:
    """Load the model of a finished run. Raises ValueError (`UserError`) if its files are missing or damaged."""
    network, card = load_run_model(Path(run), field="run")
    return Model(network, card)
