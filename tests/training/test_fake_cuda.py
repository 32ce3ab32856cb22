"""Parts of a step with tensors that claim to be on a GPU: views, signals, projectors, losses, metrics, guard, average, update.

Fake tensors keep track of device, dtype and shape and refuse to mix devices, so whatever was left on the CPU is found. They
have no values, so whatever reads one, which on a GPU waits for all queued work, is found too.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd_accel.cache.compatibility import decoded_on
from kd_accel.cache.reader import StoredValues
from kd_accel.data.transforms import ViewTransform
from kd_accel.losses.distiller import DistillationLoss
from kd_accel.losses.features import pooled_by_products
from kd_accel.models.factory import build_model
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector, PcaFit, build_projectors
from kd_accel.models.student import StudentModule
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.average import MovingAverage
from kd_accel.training.metrics import Meters
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import set_learning_rate
from kd_accel.training.trainer import train_step
from kd_accel.types import Batch, LossTerms, StudentOutput, TeacherOutput

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
STUDENT = {layer: (channels, 8, 8) for layer, channels in zip(LAYERS, (64, 128, 256, 512), strict=True)}
TEACHER = {layer: (channels, 8, 8) for layer, channels in zip(LAYERS, (256, 512, 1024, 2048), strict=True)}


def batch_on(device, policy="crop_flip"):
    samples = np.arange(4)
    stored = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=device)
    images = ViewTransform(policy, 32).on_device(stored, samples, 1)
    return Batch(images, torch.zeros(4, dtype=torch.int64, device=device), torch.from_numpy(samples).to(device), 1)


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


@pytest.mark.parametrize("use_bf16", [False, True])
@pytest.mark.parametrize("direction", ["both", "student_to_teacher", "teacher_to_student"])
def test_a_step_leaves_nothing_on_the_wrong_device(direction, use_bf16):
    with FakeTensorMode(), torch.device("cuda"):
        student = build_model("torchvision/resnet18", num_classes=10)
        network = build_model("torchvision/resnet50", num_classes=10)
        projectors = build_projectors(STUDENT, TEACHER, direction=direction)
        frozen = {layer: FeatureProjector(TEACHER[layer][0], channels) for layer, channels in projectors.pca_channels.items()}
        normalize = Normalize([0.5] * 3, [0.25] * 3).to("cuda")
        teacher = build_teacher(network, normalize, frozen, use_bf16)
        module = StudentModule(student, normalize, layers=LAYERS, student_projectors=projectors.student)
        module.start_recording()
        loss = DistillationLoss(temperature=4.0, alpha=0.5, feature_weight=0.1)
        batch = batch_on("cuda")
        with autocast(use_bf16):
            terms, output, answer = train_step(module, teacher, loss, batch)
        meters = Meters(torch.device("cuda"))
        meters.update(terms, output.logits, batch.labels, teacher_logits_BC=answer.logits)
        for tensor in (terms.total, terms.feature, output.logits, answer.logits, meters.sums, batch.images):
            assert tensor.device.type == "cuda"
        assert terms.total.dtype == answer.logits.dtype == torch.float32
        assert output.logits.dtype == (torch.bfloat16 if use_bf16 else torch.float32)
        for student_map, target in output.pairs.values():
            assert student_map.shape[:2] == target.shape[:2]
        module.stop_recording()
        teacher.close()


def build_teacher(network, normalize, frozen, use_bf16):
    """A fake tensor has no bytes, so the digest of the weights is left out."""

    class WithoutDigest(LiveTeacher):
        def digest(self):
            return "fake"

    return WithoutDigest(
        network,
        normalize,
        layers={layer: layer for layer in LAYERS},
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
        stored = StoredValues(torch.zeros(4, 3, 2, 2, dtype=dtype), scale)
        answer = decoded_on(torch.device("cuda"), stored, torch.channels_last)
        assert answer.device.type == "cuda"
        assert answer.dtype == torch.float32
        assert answer.is_contiguous(memory_format=torch.channels_last)


class FakeAccelerator:
    """What a guard asks of Accelerate's."""

    device, scaler, process_index = torch.device("cuda"), None, 0


def with_gradients():
    network = build_model("torchvision/resnet18", num_classes=10)
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    return network


def test_the_guard_and_the_average_read_nothing():
    with FakeTensorMode(), torch.device("cuda"):
        network = with_gradients()
        average, wrapped = MovingAverage(torch.nn.Identity(), decay=0.999), SimpleNamespace(optimizer=SimpleNamespace())
        average.module = build_model("torchvision/resnet18", num_classes=10).requires_grad_(
            False
        )  # no copy: fake ones have none
        guard = NonFiniteGuard(FakeAccelerator(), network, wrapped)
        batch = batch_on("cuda")
        logits = network(batch.images.float())
        hard = torch.nn.functional.cross_entropy(logits, batch.labels)
        loss = guard.guarded(LossTerms(hard, hard), StudentOutput(logits), TeacherOutput(logits.detach()), batch.samples)
        assert guard.without_gradient() == []
        norm = guard.gradient_norm(1)
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), 1.0, norm)
        average.update(network)
        found_inf = wrapped.optimizer.found_inf
        for tensor in (loss, norm, found_inf, average.module.fc.weight):
            assert tensor.device.type == "cuda"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_update_reads_nothing(name):
    """With foreach kernels, and AdamW's counts on the device: fused ones, which a training uses, have no fake form."""
    with FakeTensorMode(), torch.device("cuda"):
        network = with_gradients()
        kind, own = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {"capturable": True})}[name]
        optimizer = kind(network.parameters(), lr=0.1, foreach=True, **own)
        set_learning_rate(optimizer, 0.05)
        optimizer.step()
        state = next(iter(optimizer.state.values()))
        assert state["momentum_buffer" if name == "sgd" else "exp_avg"].device.type == "cuda"


def test_torchs_average_reads_its_counter():
    """Why there is an average of our own; and this check can fail."""
    with FakeTensorMode(), torch.device("cuda"):
        network = build_model("torchvision/resnet18", num_classes=10)
        average = AveragedModel(torch.nn.Identity(), multi_avg_fn=get_ema_multi_avg_fn(0.999))
        average.module = build_model("torchvision/resnet18", num_classes=10)
        with pytest.raises(DataDependentOutputException):
            average.update_parameters(network)


def test_deterministic_pooling_stays_on_the_device():
    with FakeTensorMode():
        feature = torch.zeros(2, 3, 7, 7, device="cuda", dtype=torch.bfloat16)
        pooled = pooled_by_products(feature, (3, 4))
        assert (pooled.device.type, pooled.dtype, pooled.shape) == ("cuda", torch.bfloat16, (2, 3, 3, 4))


def test_sums_of_a_pca_stay_on_the_device():
    with FakeTensorMode():
        fit = PcaFit(3)
        fit.update(torch.zeros(2, 3, 4, 4, device="cuda"))
        assert fit._outer.device.type == "cuda" and fit._outer.dtype == torch.float64
