"""Target functions: the frozen half of a feature loss, applied to the teacher's feature maps.

A live teacher applies them in each step; `cache build` stores their results. Their descriptions are part of a cache's
fingerprint. Target functions are deterministic and have no trained parameters.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.errors import UserError
from kd_accel.models.projectors import FeatureProjector, Shape


class TargetFunction(nn.Module):
    """Base class of frozen functions of a teacher's feature map, [B, D, H, W]."""

    explained: float | None = None
    """Fraction of the variance that the result keeps, from 0 to 1; None if it was not measured."""

    def description(self) -> dict[str, Any]:
        """Return the function's `name` and settings as plain values, from which `build_target` builds it."""
        raise NotImplementedError

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape (D, H, W) of the result for a map of shape (D, H, W)."""
        raise NotImplementedError

    @property
    def is_fitted(self) -> bool:
        """True if the function can be applied: it needs no fit, or was fitted or loaded."""
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors by name, as caches and checkpoints store them; empty for a function without a fit."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load fitted tensors, as `tensors` returned them.

        Raises:
            ValueError: If their names or shapes do not match the function.
        """
        if tensors:
            raise ValueError(f"unexpected tensors {', '.join(sorted(tensors))} for a function without a fit")


class Identity(TargetFunction):
    """Identity: the target is the teacher's feature map itself."""

    def description(self) -> dict[str, Any]:
        """Return the name `identity`, without settings."""
        return {"name": "identity"}

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the map, unchanged."""
        return shape

    def forward(self, feature: Tensor) -> Tensor:
        """Return the map unchanged, [B, D, H, W]."""
        return feature


class SpatialMean(TargetFunction):
    """Mean over the pixels of a map: the embedding of the image in this layer, in float32 or float64.

    Shape:
        [B, D, H, W] -> [B, D, 1, 1].
    """

    def description(self) -> dict[str, Any]:
        """Return the name `mean`, without settings."""
        return {"name": "mean"}

    def output_shape(self, shape: Shape) -> Shape:
        """Return (D, 1, 1) for a map of shape (D, H, W)."""
        return (shape[0], 1, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """Average maps [B, D, H, W] over H and W, to [B, D, 1, 1]."""
        return feature.mean((2, 3), keepdim=True, dtype=torch.promote_types(feature.dtype, torch.float32))


class PCA(TargetFunction):
    """Principal component analysis over channels: each pixel [D] of the teacher's map is centered, then projected.

    The projection on the leading components is a frozen 1x1 convolution, whose bias subtracts the mean. Pixels that vary in
    fewer directions than `channels`, as those of a few images with maps of one pixel do, have fewer components: the remaining
    channels of the result are zero.

    Args:
        channels: Number of principal components, which are the channels of the result.
        images: Number of training images on which the components are fitted.

    Raises:
        ValueError: If `channels` or `images` is below 1.

    Shape:
        [B, D, H, W] -> [B, channels, H, W].

    References:
        Jolliffe, "Principal Component Analysis", 2nd edition, Springer, 2002.
    """

    def __init__(self, channels: int, *, images: int = 2048) -> None:
        super().__init__()
        if channels < 1 or images < 1:
            raise ValueError(f"channels and images must be at least 1, got channels={channels} and images={images}")
        self.channels, self.images = channels, images
        self.projector: FeatureProjector | None = None
        self._sums: _Covariance | None = None

    def description(self) -> dict[str, Any]:
        """Return the name `pca`, the number of components, and the number of images of the fit."""
        return {"name": "pca", "channels": self.channels, "images": self.images}

    def output_shape(self, shape: Shape) -> Shape:
        """Return (channels, H, W) for a map of shape (D, H, W)."""
        return (self.channels, *shape[1:])

    @property
    def is_fitted(self) -> bool:
        """True if the components were fitted or loaded."""
        return self.projector is not None

    @property
    def directions(self) -> int:
        """Number of components, at most `channels`; the remaining channels of the result are zero. 0 before the fit."""
        return 0 if self.projector is None else int(self.projector.conv.weight.flatten(1).any(1).sum())

    def fit(self, features: Iterable[Tensor], *, layer: str = "the layer") -> None:
        """Fit the components in one pass: `update` for each batch of maps, then `finish`.

        Args:
            features: Batches of maps, each [B, D, H, W].
            layer: Name of the layer, for messages.

        Raises:
            UserError: If the maps have fewer than two pixels.
        """
        for feature in features:
            self.update(feature)
        self.finish(layer=layer)

    def update(self, feature: Tensor) -> None:
        """Add the pixels of a batch of maps, [B, D, H, W], to the fit."""
        self._sums = self._sums or _Covariance(feature.shape[1])
        self._sums.update(feature)

    def finish(self, *, layer: str = "the layer") -> None:
        """Compute the components from the pixels added by `update`.

        Args:
            layer: Name of the layer, for messages.

        Raises:
            UserError: If there are fewer than two pixels, which have no direction.
        """
        sums, self._sums = self._sums, None
        count = sums.count if sums else 0
        if sums is None or count < 2:
            raise UserError(
                f"distill.features: a PCA of {layer} needs two pixels or more, the images have {count}; raise args.pca_images "
                "(each image contributes height x width pixels), or use direction student_to_teacher"
            )
        self.projector, self.explained = sums.leading_components(self.channels)

    def tensors(self) -> dict[str, Tensor]:
        """Return the components `conv.weight` [channels, D, 1, 1] and the bias `conv.bias` [channels]; empty before the fit."""
        return dict(self.projector.state_dict()) if self.projector is not None else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the components and the bias, as `tensors` returned them.

        Raises:
            ValueError: If their names or shapes do not match a PCA with `channels` components.
        """
        if tensors.keys() != {"conv.weight", "conv.bias"}:
            raise ValueError(f"a PCA needs the tensors conv.weight and conv.bias, got {', '.join(sorted(tensors)) or 'none'}")
        weight, bias = tensors["conv.weight"], tensors["conv.bias"]
        if weight.ndim != 4 or weight.shape[2:] != (1, 1) or bias.shape != weight.shape[:1] or len(bias) != self.channels:
            raise ValueError(
                f"a PCA with {self.channels} components needs conv.weight of shape ({self.channels}, D, 1, 1) and conv.bias of "
                f"shape ({self.channels},), got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        projector = FeatureProjector(weight.shape[1], weight.shape[0]).requires_grad_(False)
        projector.load_state_dict(tensors)
        self.projector = projector

    def forward(self, feature: Tensor) -> Tensor:
        """Project maps [B, D, H, W] on the components, to [B, channels, H, W].

        Raises:
            RuntimeError: If the components were neither fitted nor loaded.
        """
        if self.projector is None:
            raise RuntimeError("the PCA is not fitted; call fit() or load() before the first forward")
        projected: Tensor = self.projector(feature)
        return projected


def build_target(description: Mapping[str, Any]) -> TargetFunction:
    """Build a target function from its description, not fitted.

    Args:
        description: Name and settings, as `TargetFunction.description` returns them.

    Raises:
        ValueError: If the description is not that of a known function.
    """
    settings = dict(description)
    name = settings.pop("name", None)
    if name == "identity" and not settings:
        return Identity()
    if name == "mean" and not settings:
        return SpatialMean()
    if name == "attention" and settings.keys() == {"p"}:
        # Imported late because the losses import this module.
        from kd_accel.losses.attention import AttentionMap

        return AttentionMap(settings["p"])
    if name == "pca" and settings.keys() == {"channels", "images"}:
        return PCA(settings["channels"], images=settings["images"])
    raise ValueError(f"{dict(description)!r} is not a known target function")


class _Covariance:
    """Running sums for the covariance of pixels, in float64 on the device of the maps.

    Pixels are shifted by the mean of the first batch, because the difference of plain sums of squares loses all digits if the
    mean is large (Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance", 1983).
    """

    def __init__(self, channels: int) -> None:
        self._channels, self.count = channels, 0
        self._origin: Tensor | None = None
        self._sum: Tensor
        self._outer: Tensor

    def update(self, feature: Tensor) -> None:
        pixels = feature.detach().double().movedim(1, -1).reshape(-1, self._channels)
        if self._origin is None:
            self._origin = pixels.mean(0)
            self._sum, self._outer = torch.zeros_like(self._origin), pixels.new_zeros(self._channels, self._channels)
        centered = pixels - self._origin
        self.count += len(centered)
        self._sum += centered.sum(0)
        self._outer += centered.T @ centered

    def leading_components(self, channels: int) -> tuple[FeatureProjector, float]:
        """Compute the frozen projector on the leading components, on the CPU, and the fraction of the variance it keeps.

        Components without variance, which are arbitrary, are zero.
        """
        assert self._origin is not None
        mean, origin = self._sum.cpu() / self.count, self._origin.cpu()
        covariance = self._outer.cpu() / self.count - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)
        components = _with_fixed_signs(vectors.flip(1)[:, :channels].T)
        values = values.flip(0).clamp(min=0)
        # The tolerance is that of numpy's matrix_rank.
        rank = int((values > len(values) * torch.finfo(values.dtype).eps * values[0]).sum())
        components[rank:] = 0
        projector = FeatureProjector(len(mean), channels).requires_grad_(False)
        with torch.no_grad():
            projector.conv.weight.copy_(components[:, :, None, None])
            projector.conv.bias.copy_(-components @ (mean + origin))  # type: ignore[union-attr]
        total = values.sum().item()
        return projector, values[:channels].sum().item() / total if total > 0 else 1.0


def _with_fixed_signs(components: Tensor) -> Tensor:
    """Flip components [channels, D] so that their entry of largest magnitude is positive; an eigenvector has no sign."""
    largest = components.abs().argmax(1, keepdim=True)
    return components * components.gather(1, largest).sign()
