"""Tests of the memory format chosen for images and weights on each type of device."""

import torch

from kd_accel.models.inference import image_memory_format, weight_memory_format

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


def test_image_format_is_the_setting_or_the_default_of_the_device():
    assert [image_memory_format(None, device) for device in (CPU, GPU)] == [CONTIGUOUS, LAST]
    for device in (CPU, GPU):
        assert [image_memory_format(setting, device) for setting in (True, False)] == [LAST, CONTIGUOUS]


def test_weights_on_a_cpu_are_always_contiguous():
    assert [weight_memory_format(setting, CPU) for setting in (None, True, False)] == [CONTIGUOUS] * 3
    assert [weight_memory_format(setting, GPU) for setting in (None, True, False)] == [LAST, LAST, CONTIGUOUS]
