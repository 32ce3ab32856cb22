"""Trained model for inference: the network, its classes and its preprocessing, loaded from the files of a run.

Input: image files or images. Output: a prediction for each. A file is read, decoded, cropped and resized by the functions that
make a held-out sample of an evaluation, so that the network sees the same pixels.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from kd_accel.data.color import UnknownRangeError
from kd_accel.data.decode import Decoder, as_range
from kd_accel.data.encoded import MAX_FILE_BYTES
from kd_accel.data.wrapped import square_pixels
from kd_accel.io.files import readable_size
from kd_accel.models.card import ModelCard, refuse_other_decoding
from kd_accel.models.inference import image_memory_format
from kd_accel.models.preprocess import Normalize
from kd_accel.models.weights import load_run_model


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        label: Name of the class with the largest logit, of equal ones the first.
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
        self._decoder = Decoder(card.image_size, card.background, as_range(card.pixel_range), card.crop_pct)

    @property
    def class_names(self) -> list[str]:
        """Class names, by label."""
        return self.card.label_names

    def predict(self, images: Sequence[Any] | np.ndarray | Tensor, *, batch_size: int = 256) -> list[Prediction]:
        """Predict the classes of images in float32, on the device of the network.

        The preprocessing is that of the held-out samples of the run. A file is turned upright by its EXIF orientation; a PIL
        image, array or tensor is used as it is.

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
        predictions: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            predictions += self.predict_pixels([self.pixels(image) for image in images[start : start + batch_size]])
        return predictions

    def pixels(self, image: Any) -> np.ndarray:
        """Decode, crop and resize one image, as `predict` does.

        Args:
            image: Path of an image file, PIL image, or uint8 array or tensor [H, W, 3] or [3, H, W].

        Returns:
            RGB image, uint8 [S, S, 3].

        Raises:
            TypeError: If the image has another type.
            ValueError: If a file cannot be read or decoded.
        """
        if not isinstance(image, str | Path):
            return square_pixels(image, self._decoder, where="images")
        try:
            return self._decoder.decode(_read(Path(image)))
        except OSError as error:
            raise ValueError(f"images: cannot read {image} ({error.strerror}); check the path") from None
        except UnknownRangeError as error:
            reason = str(error).partition("; set ")[0]
            raise ValueError(
                f"images: cannot decode {image} ({reason}, and neither does model.json: the run has no data.pixel_range); "
                "convert the file to 8 bits"
            ) from None
        except ValueError as error:
            raise ValueError(f"images: cannot decode {image} ({error}); use another file") from None

    @torch.no_grad()
    def predict_pixels(self, pixels: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict the classes of resized images in one forward. pixels: RGB images of `pixels`, uint8 [S, S, 3] each."""
        device = next(self.network.parameters()).device
        normalize = Normalize(self.card.mean, self.card.std, memory_format=image_memory_format(None, device)).to(device)
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device)
        logits = self.network(normalize(batch)).float()
        return list(map(self._prediction, logits.argmax(1).tolist(), logits.softmax(1).tolist()))

    def _prediction(self, label: int, probabilities: list[float]) -> Prediction:
        by_name = dict(zip(self.class_names, probabilities, strict=True))
        return Prediction(self.class_names[label], probabilities[label], by_name)


def load_model(run: str | Path) -> Model:
    """Load the model of a finished run.

    Args:
        run: Run directory, of which `model.safetensors` and `model.json` are read.

    Raises:
        ValueError: If a file is missing or damaged, or this version decodes images otherwise (`UserError`).
    """
    network, card = load_run_model(Path(run), field="run")
    refuse_other_decoding(card, Path(run))
    return Model(network, card)


def _read(path: Path) -> bytes:
    """Read an image file within the bounds of `EncodedImages`. Raises OSError or ValueError."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("not a regular file")
    if state.st_size > MAX_FILE_BYTES:
        raise ValueError(f"the file is larger than {readable_size(MAX_FILE_BYTES)}")
    return path.read_bytes()
