"""Resizing of views for a teacher: a pure function of the pixels, compared with Pillow and torchvision."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from kd_accel.models.preprocess import Resize
from tests.support.pixels import noise, pillow

SIZES = [(16, 32, 1.0), (32, 96, 1.0), (64, 32, 1.0), (100, 37, 1.0), (32, 32, 0.875), (64, 48, 0.95), (64, 56, 0.875)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "image_size", "crop_pct"), SIZES)
def test_a_view_is_resized_as_by_pillow_and_torchvision(size, image_size, crop_pct, interpolation):
    images, resize = noise(size), Resize(image_size, interpolation, crop_pct)
    actual = resize(images)
    assert actual.dtype == torch.float32 and actual.shape == (2, 3, image_size, image_size)
    exact, in_8_bits = (pillow(images, image_size, interpolation, crop_pct, dtype) for dtype in (np.float32, np.uint8))
    assert np.abs(actual.numpy() - exact).max() < 2e-3
    assert np.abs(actual.numpy() - in_8_bits).max() < 2
    mode = v2.InterpolationMode(interpolation)
    torchvision = v2.functional.resize(images, [int(image_size / crop_pct)] * 2, mode, antialias=True)
    assert (actual - v2.functional.center_crop(torchvision, [image_size] * 2).float()).abs().max() < 2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_resized_pixels_depend_on_the_pixels_of_one_image_alone(interpolation):
    images, resize = noise(32, samples=5), Resize(48, interpolation, 0.9)
    expected = resize(images)
    assert torch.equal(resize(images.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(resize(images.float()), expected)
    assert torch.equal(torch.cat([resize(image[None]) for image in images]), expected)
    with pytest.raises(ValueError, match="images: 32x24 pixels must be square for a teacher with its own image size"):
        resize(images[..., :24])


def test_the_crop_alone_keeps_the_pixels():
    images = noise(64)
    assert torch.equal(Resize(56, crop_pct=0.875)(images), images[:, :, 4:60, 4:60].float())
