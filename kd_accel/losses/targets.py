"""Target functions: the frozen half of a feature loss, applied to the teacher's map.

A live teacher applies them in each step, `cache build` stores their results, and their descriptions are part of a cache's
fingerprint. They are deterministic and hold no trained parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.errors import UserError
from kd_accel.models.projectors import FeatureProjector, Shape


class TargetFunction(nn.Module):
    """A frozen function of a teacher's feature map [B, D, H, W]."""

    explained: float | None = None
    """Share of the variance that the result keeps, where the function has measured it."""

    def description(self) -> dict[str, Any]:
        """Return the settings that decide the function, as plain values with a `name`."""
        raise NotImplementedError

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of one result for a map of the given shape."""
        raise NotImplementedError

    @property
    def is_fitted(self) -> bool:
        """Whether the function can be applied; one that must first see samples is fitted by `fit`."""
        return True

    def tensors(self) -> dict[str, Tensor]:
        """Return the fitted tensors by name, as a cache or a checkpoint stores them; empty if there are none."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take fitted tensors back. Raises ValueError if they do not fit."""
        if tensors:
            raise ValueError(f"unexpected tensors {sorted(tensors)}")


class Identity(TargetFunction):
    """The map itself."""

    def description(self) -> dict[str, Any]:
        """Return the name `identity`, which has no settings."""
        return {"name": "identity"}

    def output_shape(self, shape: Shape) -> Shape:
        """Return the shape of the map unchanged."""
        return shape

    def forward(self, feature: Tensor) -> Tensor:
        """Return the map unchanged, [B, D, H, W]."""
        return feature


class PCA(TargetFunction):
    """A projection on the leading principal directions of the teacher's pixels, with the mean as bias.

    Args:
        channels: number of directions, the channels of the result.
        images: number of training images on which the directions are fitted.

    Shape:
        [B, D, H, W] -> [B, channels, H, W].
    """

    def __init__(self, channels: int, *, images: int = 2048) -> None:
        super().__init__()
        if channels < 1 or images < 1:
            raise ValueError(f"channels and images must be at least 1, not {channels} and {images}")
        self.channels, self.images = channels, images
        self.projector: FeatureProjector | None = None
        self._sums: _Covariance | None = None

    def description(self) -> dict[str, Any]:
        """Return the name `pca`, the number of directions and the number of images of the fit."""
        return {"name": "pca", "channels": self.channels, "images": self.images}

    def output_shape(self, shape: Shape) -> Shape:
        """Return (channels, H, W) for a map of shape (D, H, W)."""
        return (self.channels, *shape[1:])

    @property
    def is_fitted(self) -> bool:
        """Whether the directions are known, from `fit` or `load`."""
        return self.projector is not None

    def fit(self, features: Iterable[Tensor], *, layer: str = "the layer") -> None:
        """Fit on maps [B, D, H, W] in one pass: `update` for each, then `finish`."""
        for feature in features:
            self.update(feature)
        self.finish(layer=layer)

    def update(self, feature: Tensor) -> None:
        """Add the pixels of maps [B, D, H, W] to the fit."""
        self._sums = self._sums or _Covariance(feature.shape[1])
        self._sums.update(feature)

    def finish(self, *, layer: str = "the layer") -> None:
        """Compute the directions from what was added. layer: its name, for the error.

        Raises:
            UserError: fewer pixels than `channels` + 1, which leave the directions arbitrary.
        """
        sums, self._sums = self._sums, None
        count = sums.count if sums else 0
        if sums is None or count <= self.channels:
            raise UserError(
                f"distill.features: {count} pixels at {layer} are too few to fit {self.channels} principal directions; raise "
                "pca_images (an image gives height times width pixels)"
            )
        self.projector, self.explained = sums.leading_directions(self.channels)

    def tensors(self) -> dict[str, Tensor]:
        """Return the directions `conv.weight` [channels, D, 1, 1] and the bias `conv.bias` [channels]; empty before the fit."""
        return dict(self.projector.state_dict()) if self.projector is not None else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore a fit from what `tensors` returned. Raises ValueError for other names or shapes."""
        if tensors.keys() != {"conv.weight", "conv.bias"}:
            raise ValueError(f"a PCA has conv.weight and conv.bias, not {sorted(tensors)}")
        weight, bias = tensors["conv.weight"], tensors["conv.bias"]
        if weight.ndim != 4 or weight.shape[2:] != (1, 1) or bias.shape != weight.shape[:1] or len(bias) != self.channels:
            raise ValueError(f"not a 1x1 convolution to {self.channels} channels: {tuple(weight.shape)}")
        projector = FeatureProjector(weight.shape[1], weight.shape[0]).requires_grad_(False)
        projector.load_state_dict(tensors)
        self.projector = projector

    def forward(self, feature: Tensor) -> Tensor:
        """Project maps [B, D, H, W] on the directions, [B, channels, H, W]; the function must be fitted."""
        assert self.projector is not None, "a PCA must be fitted or loaded before it is applied"
        projected: Tensor = self.projector(feature)
        return projected


def build_target(description: Mapping[str, Any]) -> TargetFunction:
    """Build the function of a description, not fitted. Raises ValueError for one that is not known."""
    settings = dict(description)
    name = settings.pop("name", None)
    if name == "identity" and not settings:
        return Identity()
    if name == "pca" and settings.keys() == {"channels", "images"}:
        return PCA(settings["channels"], images=settings["images"])
    raise ValueError(f"{dict(description)!r} is not a known target function")


class _Covariance:
    """Sums in float64 over maps given in a fixed order, on the device of the maps.

    They are taken around the mean of the first batch, so that nothing cancels.
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

    def leading_directions(self, channels: int) -> tuple[FeatureProjector, float]:
        """Return the frozen projector on the leading directions, computed on the CPU, and its share of the variance."""
        assert self._origin is not None
        mean, origin = self._sum.cpu() / self.count, self._origin.cpu()
        covariance = self._outer.cpu() / self.count - mean.outer(mean)
        values, vectors = torch.linalg.eigh(covariance)
        directions = _with_fixed_signs(vectors.flip(1)[:, :channels].T)
        values = values.flip(0).clamp(min=0)
        projector = FeatureProjector(len(mean), channels).requires_grad_(False)
        with torch.no_grad():
            projector.conv.weight.copy_(directions[:, :, None, None])
            projector.conv.bias.copy_(-directions @ (mean + origin))  # type: ignore[union-attr]
        total = values.sum().item()
        return projector, values[:channels].sum().item() / total if total > 0 else 1.0


def _with_fixed_signs(directions: Tensor) -> Tensor:
    """Make the entry of largest magnitude in each direction positive: otherwise one fit would have 2^D results."""
    largest = directions.abs().argmax(1, keepdim=True)
    return directions * directions.gather(1, largest).sign()
