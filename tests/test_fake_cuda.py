"""On a machine without a GPU: views, signals, projectors, losses and metrics with tensors that only claim to be on one.

Fake tensors keep track of device, dtype and shape and refuse to mix devices, so whatever was left on the CPU is found.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kd_accel.data.views import ViewFunction
from kd_accel.engine.meters import Meters
from kd_accel.engine.train import train_step
from kd_accel.losses.combine import DistillationLoss
from kd_accel.losses.feature import target_variance
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector, build_projectors
from kd_accel.models.student import StudentModule
from kd_accel.models.zoo import build_model
from kd_accel.teacher.cached import decoded_on
from kd_accel.teacher.live import LiveTeacher
from kd_accel.teacher.store.reader import StoredRows
from kd_accel.types import Batch

TAPS = ["layer1", "layer2", "layer3", "layer4"]
STUDENT = {tap: (channels, 8, 8) for tap, channels in zip(TAPS, (64, 128, 256, 512), strict=True)}
TEACHER = {tap: (channels, 8, 8) for tap, channels in zip(TAPS, (256, 512, 1024, 2048), strict=True)}


def batch_on(device, policy="crop_flip"):
    rows = np.arange(4)
    stored = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=device)
    images = ViewFunction(policy, 32).on_device(stored, rows, 1)
    return Batch(images, torch.zeros(4, dtype=torch.int64, device=device), torch.from_numpy(rows).to(device), 1)


@contextmanager
def autocast(use_bf16):
    """torch.autocast("cuda") switches itself off without a GPU, so its switches are set by hand."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", use_bf16)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@pytest.mark.slow
@pytest.mark.parametrize("use_bf16", [False, True])
@pytest.mark.parametrize(
    ("direction", "kind"),
    [("both", "pca"), ("student_to_teacher", "pca"), ("teacher_to_student", "pca"), ("teacher_to_student", "learned")],
)
def test_a_step_leaves_nothing_on_the_wrong_device(direction, kind, use_bf16):
    with FakeTensorMode(), torch.device("cuda"):
        student = build_model("torchvision/resnet18", num_classes=10)
        network = build_model("torchvision/resnet50", num_classes=10)
        projectors = build_projectors(STUDENT, TEACHER, direction=direction, teacher_projector=kind)
        frozen = {tap: FeatureProjector(TEACHER[tap][0], channels) for tap, channels in projectors.pca_channels.items()}
        normalize = Normalize([0.5] * 3, [0.25] * 3).to("cuda")
        teacher = build_teacher(network, normalize, frozen, use_bf16)
        module = StudentModule(
            student, normalize, taps=TAPS, student_projectors=projectors.student, teacher_projectors=projectors.teacher
        )
        module.open_taps()
        loss = DistillationLoss(temperature=4.0, alpha=0.5, feature_weight=0.1)
        batch = batch_on("cuda")
        with autocast(use_bf16):
            terms, output, answer = train_step(module, teacher, loss, batch)
        meters = Meters(torch.device("cuda"))
        meters.update(
            terms,
            output.logits,
            batch.labels,
            teacher_logits_BC=answer.logits,
            target_variance=target_variance(output.pairs),
        )
        for tensor in (terms.total, terms.feature, output.logits, answer.logits, meters.sums, batch.images):
            assert tensor.device.type == "cuda"
        assert terms.total.dtype == answer.logits.dtype == torch.float32
        assert output.logits.dtype == (torch.bfloat16 if use_bf16 else torch.float32)
        for student_map, target in output.pairs.values():
            assert student_map.shape[:2] == target.shape[:2]
        module.close_taps()
        teacher.close()


def build_teacher(network, normalize, frozen, use_bf16):
    """A fake tensor has no bytes, so the digest of the weights is left out."""

    class WithoutDigest(LiveTeacher):
        def digest(self):
            return "fake"

    return WithoutDigest(
        network,
        normalize,
        taps={tap: tap for tap in TAPS},
        projectors=frozen,
        autocast=lambda: autocast(use_bf16),
    )


def test_the_check_can_fail():
    with FakeTensorMode():
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            Normalize([0.5] * 3, [0.25] * 3)(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_stored_answers_are_decoded_on_the_device(dtype):
    with FakeTensorMode():
        scale = torch.ones(4, 3) if dtype == torch.int8 else None
        stored = StoredRows(torch.zeros(4, 3, 2, 2, dtype=dtype), scale)
        answer = decoded_on(torch.device("cuda"), stored, torch.channels_last)
        assert answer.device.type == "cuda"
        assert answer.dtype == torch.float32
        assert answer.is_contiguous(memory_format=torch.channels_last)
