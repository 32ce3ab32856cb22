"""Images on which an export is compared with its network: held-out samples of the run, or random ones without its data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_accel.config.data_schema import DataConfig
from kd_accel.data.held_out import load_held_out
from kd_accel.errors import UserError
from kd_accel.models.card import ModelCard

MAX_SAMPLES = 200


@dataclass(frozen=True)
class ParitySamples:
    """Images for the comparison.

    Attributes:
        images: RGB images, uint8 [N, 3, S, S].
        origin: Description of the images, for messages.
    """

    images: Tensor
    origin: str


def parity_samples(card: ModelCard, data: DataConfig | None, problem: str = "") -> ParitySamples:
    """Read at most `MAX_SAMPLES` test samples of a run, or draw random images if its data cannot be read.

    Args:
        card: Card of the model.
        data: Data settings of the run; None = not known.
        problem: Reason why the settings are not known.
    """
    if data is not None:
        try:
            return _held_out(card, data)
        except UserError as error:
            problem = str(error)
    size = card.image_size
    images = torch.randint(256, (MAX_SAMPLES, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ParitySamples(images, f"{len(images)} random images (seed 0), because the test samples cannot be read ({problem})")


def _held_out(card: ModelCard, data: DataConfig) -> ParitySamples:
    limit = min(MAX_SAMPLES, data.limit_test or MAX_SAMPLES)
    own = {"mean": card.mean, "std": card.std, "image_size": card.image_size, "limit_test": limit}
    part = load_held_out(data.model_copy(update=own), "test", card.label_names).parts()["test"]
    if not len(part.samples):
        raise UserError("data: the test split is empty")
    images = torch.from_numpy(part.images.pixels(part.samples)).permute(0, 3, 1, 2).contiguous()
    return ParitySamples(images, f"{len(images)} test samples")
