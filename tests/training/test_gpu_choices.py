"""Choices that depend on a GPU, as far as a test without a GPU can check them."""

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs

from kd_accel import distributed
from kd_accel.data.datamodule import notices_of_small_batches
from kd_accel.distributed import peer_timeout_s
from kd_accel.models.factory import build_model
from kd_accel.models.inference import choose_kernels
from kd_accel.teacher.teacher import Teacher
from tests.support.models import SmallNet

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_one_setting_for_convolutions_and_matrix_products(tf32):
    try:
        choose_kernels(tf32=tf32)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    finally:
        choose_kernels()


def test_tf32_is_part_of_the_fingerprint_on_a_gpu_alone():
    teacher = Teacher(SmallNet(4, width=4), [0.5] * 3, [0.5] * 3)

    def numerics(tf32, device):
        return teacher.numerics(
            device, layers=[], image_size=32, precision="float32", channels_last=False, compiled=False, tf32=tf32
        )

    assert numerics(True, GPU) == {**numerics(False, GPU), "tf32": True}
    assert numerics(True, CPU) == numerics(False, CPU) == numerics(False, GPU)


@pytest.mark.parametrize(
    ("has_gpu", "setting", "gloo_s"), [(True, None, 600), (False, None, 1800), (True, 5.0, 5), (False, 5.0, 5)]
)
def test_timeouts_of_the_process_groups(monkeypatch, has_gpu, setting, gloo_s):
    """NCCL's timeout is longer than gloo's, because only gloo raises an exception."""
    joined = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(distributed, "Accelerator", lambda **arguments: joined.update(arguments))
    distributed._joined("float32", None, setting)
    (waits,) = [each.timeout for each in joined["kwargs_handlers"] if isinstance(each, InitProcessGroupKwargs)]
    assert peer_timeout_s(setting) == gloo_s
    assert waits.total_seconds() == gloo_s + (60 if has_gpu else 0)


def test_batchnorm_is_fused_before_the_network_is_moved():
    """The fused copy is compared with the original, which is impossible on a device without values and imprecise with TF32."""
    teacher = Teacher(build_model("torchvision/resnet18", num_classes=10), [0.5] * 3, [0.25] * 3)
    network, _ = teacher.on_device(torch.device("meta"), image_size=32, channels_last=False, cpu_kernels="never")
    assert network.conv1.weight.device.type == "meta"
    assert isinstance(network.bn1, torch.nn.Identity) and network.conv1.bias is not None
    assert teacher.network.conv1.weight.device.type == "cpu" and isinstance(teacher.network.bn1, torch.nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("batch_size", "processes", "image_size", "device", "has_notice"),
    [
        (128, 8, 32, GPU, True),
        (1024, 8, 32, GPU, False),
        (127, 1, 32, GPU, True),
        (128, 8, 64, GPU, False),
        (128, 8, 32, CPU, False),
    ],
)
def test_a_forward_of_few_small_images_on_a_gpu_has_a_notice(batch_size, processes, image_size, device, has_notice):
    notices = notices_of_small_batches(device, batch_size=batch_size, image_size=image_size, processes=processes)
    assert len(notices) == has_notice
    assert all(f"{batch_size // processes} images of {image_size} pixels in a forward" in notice for notice in notices)
