"""What is chosen where there is a GPU, as far as the choice itself can be seen without one."""

import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs

from benchmarks.jobs import fused_teacher
from kd_accel import distributed
from kd_accel.commands.teacher import TeacherNetwork, numeric_mode
from kd_accel.config.schema import DataConfig, RunConfig, TeacherConfig, TrainConfig
from kd_accel.data.datamodule import notices_of_small_batches
from kd_accel.distributed import peer_timeout_s
from kd_accel.models.kernels import choose_kernels
from tests.own_models import SmallNet

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_one_setting_for_convolutions_and_matrix_products(tf32):
    try:
        choose_kernels(tf32=tf32)
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    finally:
        choose_kernels()


def test_tf32_is_part_of_what_a_cache_is_recognised_by_on_a_gpu_alone():
    teacher = TeacherNetwork(SmallNet(4, width=4), "x", "imagenet", {}, [0.5] * 3, [0.5] * 3, None)

    def mode(tf32, device):
        config = RunConfig(teacher=TeacherConfig(run="t"), train=TrainConfig(tf32=tf32, channels_last=False))
        return numeric_mode(config, teacher, {}, device)

    assert mode(True, GPU) == {**mode(False, GPU), "tf32": True}
    assert mode(True, CPU) == mode(False, CPU) == mode(False, GPU)


@pytest.mark.parametrize(
    ("has_gpu", "setting", "gloo_s"), [(True, None, 600), (False, None, 1800), (True, 5.0, 5), (False, 5.0, 5)]
)
def test_how_long_ranks_wait(monkeypatch, has_gpu, setting, gloo_s):
    """NCCL, the first group of a launch with GPUs, longer than gloo, whose error comes as an exception."""
    joined = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(distributed, "Accelerator", lambda **arguments: joined.update(arguments))
    distributed._joined("no", None, setting)
    (waits,) = [each.timeout for each in joined["kwargs_handlers"] if isinstance(each, InitProcessGroupKwargs)]
    assert peer_timeout_s(setting) == gloo_s
    assert waits.total_seconds() == gloo_s + (60 if has_gpu else 0)


def test_benchmarks_fold_batchnorm_before_a_model_is_moved():
    """Where it is moved there are no numbers by which the folded one could be compared, as there are none in full with TF32."""
    teacher = fused_teacher(torch.device("meta"))
    assert teacher.conv1.weight.device.type == "meta"
    assert isinstance(teacher.bn1, torch.nn.Identity) and teacher.conv1.bias is not None


@pytest.mark.parametrize(
    ("batch_size", "processes", "image_size", "device", "is_told"),
    [
        (128, 8, 32, GPU, True),
        (1024, 8, 32, GPU, False),
        (127, 1, 32, GPU, True),
        (128, 8, 64, GPU, False),
        (128, 8, 32, CPU, False),
    ],
)
def test_few_small_images_for_each_gpu_are_told(batch_size, processes, image_size, device, is_told):
    config = RunConfig(data=DataConfig(image_size=image_size), train=TrainConfig(batch_size=batch_size))
    notices = notices_of_small_batches(config, device, processes=processes)
    assert len(notices) == is_told
    assert all(f"{batch_size // processes} images of {image_size} pixels in a forward" in notice for notice in notices)
