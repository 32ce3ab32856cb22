"""Tests of the input normalization against NumPy, for both memory formats and pixel types."""

import numpy as np
import pytest
import torch

from kd_accel.models.preprocess import Normalize


def test_normalization_equals_numpy():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.25, 0.3]
    expected = (images.numpy() / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    normalized = Normalize(mean, std)(images)
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(Normalize(mean, std)(images.contiguous()), normalized)
    assert Normalize(mean, std).state_dict() == {}


@pytest.mark.parametrize("own_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("memory_format", [torch.preserve_format, torch.contiguous_format, torch.channels_last])
def test_float_pixels_are_normalized_to_the_same_bits(own_format, memory_format):
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 8, 32).contiguous(memory_format=own_format)
    pixels, normalize = levels.float(), Normalize([0.1, 0.48, 0.93], [0.21, 0.257, 0.3], memory_format=memory_format)
    expected = normalize(levels)
    assert torch.equal(normalize(pixels), expected) and normalize(pixels).stride() == expected.stride()
    assert torch.equal(pixels, levels.float())


def test_gradients_flow_through_float_pixels():
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    Normalize([0.5] * 3, [0.25] * 3)(pixels).sum().backward()
    assert torch.allclose(pixels.grad, torch.full_like(pixels, 1 / (255 * 0.25)))
