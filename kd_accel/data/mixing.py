"""Mixtures of two training samples, mixup and cutmix, as a pure function of the sample, the view and the training samples.

Input: hash words of samples, their views and the views of their partners. Output: mixed views and labels.

A weight is a multiple of 2**-16 and a pixel a multiple of 1 below 256, so a float32 holds their products and the sums of two
products exactly. Mixed pixels are therefore the same on each device, in any order of operations.

Shapes: n samples, S side of the square images in pixels, C classes.

References:
    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019.
    TorchVision 0.29, `torchvision.transforms.v2.CutMix`: the rectangle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kd_accel.config.transform_schema import MixingSettings
from kd_accel.data.hashing import uniform
from kd_accel.data.operations import MixUp

NUM_WORDS = 5
"""Hash words of a sample: choice of the transform, weight, partner, and the center of the rectangle, across and down."""
_QUANTILE_BITS, _WEIGHT_STEPS = 12, 1 << 16


@dataclass(frozen=True)
class Mix:
    """Mixture of each sample of a batch with its partner.

    Attributes:
        partners: Index of each partner in the source split, int64 [n]; that of the sample itself where nothing is mixed.
        opacity: Weight of the sample's pixels outside the rectangle, float32 [n], multiples of 2**-16; 1 without mixup.
        boxes: Rectangle (left, top, width, height) with the partner's pixels, int64 [n, 4]; empty without cutmix.
        weights: Share of the sample's label, float32 [n].
        is_float: Whether pixels are float32, as with mixup; else uint8.
    """

    partners: np.ndarray
    opacity: np.ndarray
    boxes: np.ndarray
    weights: np.ndarray
    is_float: bool

    @property
    def mixed(self) -> np.ndarray:
        """Positions of the samples that are mixed with a partner, int64 [m]."""
        return np.flatnonzero(self.weights < 1)

    def pixels(self, views: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Mix views in host memory.

        Args:
            views: Views of the samples, uint8 [n, S, S, 3]; may be overwritten.
            partners: Views of the partners of the mixed samples, uint8 [m, S, S, 3].

        Returns:
            Mixed views, [n, S, S, 3], in the memory format of `views`: uint8, or float32 in 0..255 with mixup.
        """
        if self.is_float:
            views = views.astype(np.float32)
        mixed = self.mixed
        draws = self.opacity[mixed], self.boxes[mixed].tolist()
        # One image at a time, because temporary arrays of a batch of large images would not fit in a processor's cache.
        for position, partner, opacity, (left, top, width, height) in zip(mixed, partners, *draws, strict=True):
            view, rectangle = views[position], (slice(top, top + height), slice(left, left + width))
            if opacity < 1:
                view *= opacity
                view += np.multiply(partner, 1 - opacity, dtype=np.float32)
            view[rectangle] = partner[rectangle]
        return views

    def on_device(self, views: Tensor, partners: Tensor) -> Tensor:
        """Mix views on their device; the pixels equal those of `pixels`.

        Args:
            views: Views of the samples, uint8 [n, 3, S, S], on any device.
            partners: Views of the partners of all samples, uint8 [n, 3, S, S], on the same device.

        Returns:
            Mixed views, [n, 3, S, S], uint8 or float32.
        """
        # A blocking copy to a GPU would synchronize with all queued work.
        boxes = torch.from_numpy(self.boxes).to(views.device, non_blocking=True)
        mixed = torch.where(in_boxes(boxes, size=views.shape[3]), partners, views)
        if not self.is_float:
            return mixed
        opacity = torch.from_numpy(self.opacity).to(views.device, non_blocking=True)[:, None, None, None]
        return mixed * opacity + partners * (1 - opacity)

    def labels(self, own: np.ndarray, partners: np.ndarray, *, num_classes: int) -> np.ndarray:
        """Mix labels.

        Args:
            own: Class indices of the samples, int64 [n]; -1 = no label.
            partners: Class indices of the partners, int64 [n].
            num_classes: Number of classes, C.

        Returns:
            Share of each class, float32 [n, C]. A row sums to 1, or is zero if one of the mixed samples has no label.
        """
        shares, row = np.zeros((len(own), num_classes), dtype=np.float32), np.arange(len(own))
        shares[row, own] = self.weights
        shares[row, partners] += 1 - self.weights
        shares[((own < 0) & (self.weights > 0)) | ((partners < 0) & (self.weights < 1))] = 0
        return shares


def draw_mix(mixing: Sequence[MixingSettings], words: np.ndarray, samples: np.ndarray, among: np.ndarray, *, size: int) -> Mix:
    """Draw the mixture of each sample.

    A partner is drawn uniformly among all training samples, so it may be the sample itself. The first word chooses one of the
    transforms, or none: in their order each has a part of [0, 1) as long as its p.

    Args:
        mixing: `MixUp` and `CutMix` transforms, in their order, whose probabilities sum to at most 1.
        words: Hash words of the samples, uint64 [n, NUM_WORDS].
        samples: Index of each sample in its source split, int64 [n].
        among: Indices of the samples among which partners are drawn, int64 [N].
        size: Side of the images, S.
    """
    choices, start = uniform(words[:, 0]), 0.0
    opacity, boxes = np.ones(len(samples), dtype=np.float32), np.zeros((len(samples), 4), dtype=np.int64)
    for each in mixing:
        is_chosen = (choices >= start) & (choices < start + each.p)
        start += each.p
        drawn = beta_quantiles(each.alpha)[words[is_chosen, 1] >> np.uint64(64 - _QUANTILE_BITS)]
        if isinstance(each, MixUp):
            opacity[is_chosen] = drawn
        else:
            boxes[is_chosen] = _rectangles(drawn, words[is_chosen, 3:], size)
    areas = boxes[:, 2] * boxes[:, 3]
    # One of the factors is 1.
    weights = (opacity * ((size * size - areas) / (size * size))).astype(np.float32)
    partners = np.where(weights < 1, among[_below(words[:, 2], len(among))], samples)
    return Mix(partners, opacity, boxes, weights, is_float=any(isinstance(each, MixUp) for each in mixing))


def in_boxes(boxes: Tensor, *, size: int) -> Tensor:
    """Return the pixels that are inside a rectangle of each image.

    Args:
        boxes: (left, top, width, height), int64 [n, 4].
        size: Side of the images, S.

    Returns:
        Mask, bool [n, 1, S, S].
    """
    left, top, width, height = boxes.T[..., None, None, None]
    steps = torch.arange(size, device=boxes.device)
    return (steps >= left) & (steps < left + width) & ((steps >= top) & (steps < top + height)).mT


@lru_cache(maxsize=8)
def beta_quantiles(alpha: float) -> np.ndarray:
    """Compute quantiles of the distribution Beta(alpha, alpha), at the centers of 4096 equal parts of [0, 1].

    They are rounded to multiples of 2**-16, far above the differences between machines: the lower half by counting the
    roundings' limits whose cumulative probability is below that of the quantile, the upper half by symmetry.

    Returns:
        Quantiles in 0..1, float32 [4096], ascending.
    """
    half = 1 << (_QUANTILE_BITS - 1)
    limits = (np.arange(_WEIGHT_STEPS // 2) + 0.5) / _WEIGHT_STEPS
    lower = np.searchsorted(_beta_cdf(limits, alpha), (np.arange(half) + 0.5) / (2 * half)) / _WEIGHT_STEPS
    return np.concatenate([lower, 1 - lower[::-1]]).astype(np.float32)


def _beta_cdf(x: np.ndarray, alpha: float) -> np.ndarray:
    """Compute the cumulative probability of Beta(alpha, alpha) at x in (0, 1/2), by a series without cancellation.

    References:
        NIST Digital Library of Mathematical Functions, 8.17.8 with the hypergeometric series 15.2.1.
    """
    total, term, n = np.ones_like(x), np.ones_like(x), 0
    while term[-1] > np.finfo(np.float64).eps * total[-1]:
        term = term * ((2 * alpha + n) / (alpha + 1 + n)) * x
        total, n = total + term, n + 1
    log_scale = math.lgamma(2 * alpha) - 2 * math.lgamma(alpha) - math.log(alpha)
    return np.exp(log_scale + alpha * (np.log(x) + np.log1p(-x))) * total


def _rectangles(weights: np.ndarray, words: np.ndarray, size: int) -> np.ndarray:
    """Return (left, top, width, height) of each rectangle, int64 [n, 4], as torchvision: clipped, around a uniform point.

    Args:
        weights: Area outside the rectangle before it is clipped, as a fraction of the image, float32 [n].
        words: Hash words of the center, uint64 [n, 2].
        size: Side of the images, S.
    """
    half = np.floor(0.5 * np.sqrt(1 - weights.astype(np.float64)) * size).astype(np.int64)[:, None]
    center = _below(words, size)
    start, end = np.maximum(center - half, 0), np.minimum(center + half, size)
    return np.concatenate([start, end - start], axis=1)


def _below(words: np.ndarray, limit: int) -> np.ndarray:
    """Map hash words to integers from 0 to `limit` - 1: the upper 32 bits times `limit`, over 2**32.

    The probabilities of two integers differ by a fraction of at most `limit` / 2**32. Returns int64, same shape.
    """
    return ((words >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int64)
