"""Fitting of target functions (PCA) on the teacher's features of a few training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.data.datamodule import DataModule
from kd_accel.data.hashing import hashed_order
from kd_accel.losses.targets import PCA, TargetFunction
from kd_accel.models.feature_extractor import FeatureExtractor

_BATCH_SAMPLES = 128
_PURPOSE = 31


def fit_targets(
    targets: Mapping[str, TargetFunction],
    data: DataModule,
    network: nn.Module,
    normalize: nn.Module,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fit the target functions that are not fitted yet, in place, on the device of the teacher.

    Args:
        targets: Target functions by the teacher's layer.
        data: Data whose training samples are used: a subset drawn by a hash, in the order of their indices, in view 0.
        network: The teacher's network, on its device.
        normalize: Module that turns uint8 images [B, 3, H, W] into the input of the network.
        autocast: Context in which the teacher runs.

    Raises:
        UserError: If the maps of the images have fewer than two pixels.
    """
    lacking = {layer: target for layer, target in targets.items() if isinstance(target, PCA) and not target.is_fitted}
    for images in sorted({target.images for target in lacking.values()}):
        group = {layer: target for layer, target in lacking.items() if target.images == images}
        _fit_group(group, _recorded(list(group), data, network, normalize, images, autocast))


def fit_notices(targets: Mapping[str, TargetFunction], *, num_samples: int) -> list[str]:
    """Return lines for the user: the variance that each fit keeps, and warnings if directions or requested images are missing.

    Args:
        targets: Target functions by the teacher's layer.
        num_samples: Number of training samples.
    """
    fitted = {layer: target for layer, target in targets.items() if isinstance(target, PCA)}
    notices = [f"PCA of {layer} explains {target.explained:.1%} of the variance" for layer, target in fitted.items()]
    notices += [
        _missing_directions(layer, target, num_samples=num_samples)
        for layer, target in fitted.items()
        if target.directions < target.channels
    ]
    requested = max((target.images for target in fitted.values()), default=0)
    if requested > num_samples:
        notices.append(
            f"distill.features: pca_images {requested} is more than the {num_samples} training samples; the PCA is fitted on "
            "all training samples"
        )
    return notices


def _missing_directions(layer: str, target: PCA, *, num_samples: int) -> str:
    """Return the warning for a fit with fewer principal directions than channels."""
    images, zero = min(target.images, num_samples), target.channels - target.directions
    remedy = "raise args.pca_images, or use" if target.images < num_samples else "use more training samples, or"
    return (
        f"distill.features: {layer} of the {images} images of the fit varies in {target.directions} directions, fewer than the "
        f"{target.channels} channels of its target; {zero} channels are zero ({remedy} direction student_to_teacher)"
    )


def _fit_group(group: Mapping[str, PCA], recorded: Iterator[dict[str, Tensor]]) -> None:
    """Fit several functions in one pass over the teacher's features."""
    for features in recorded:
        for layer, feature in features.items():
            group[layer].update(feature)
    for layer, target in group.items():
        target.finish(layer=layer)


def _recorded(
    layers: Sequence[str],
    data: DataModule,
    network: nn.Module,
    normalize: nn.Module,
    images: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[dict[str, Tensor]]:
    samples = np.sort(hashed_order((_PURPOSE,), data.training_samples)[:images])
    device = next(network.parameters()).device
    network.eval()
    with FeatureExtractor(network, layers) as extractor, torch.no_grad(), autocast():
        for part in np.array_split(samples, -(-len(samples) // _BATCH_SAMPLES)):
            network(normalize(data.view_batch(part, 0).images.to(device)))
            yield extractor.take()
