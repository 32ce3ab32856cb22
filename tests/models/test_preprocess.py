"""Tests of the input normalization against NumPy, for both memory formats and pixel types."""

import numpy as np
import torch

from kd_accel.models.preprocess import Normalize


def test_normalization_equals_numpy():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.25, 0.3]
    expected = (images.numpy() / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    normalized = Normalize(mean, std)(images)
    np.testing.assert_allclose(normalized.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(Normalize(mean, std)(images.float()), normalized)
    assert torch.equal(Normalize(mean, std)(images.contiguous()), normalized)
    assert Normalize(mean, std).state_dict() == {}
