"""Parts of a step with fake CUDA tensors: views, teacher, distiller, metrics, guard, average, update.

Fake tensors have a device, dtype and shape, and an operator with tensors of two devices fails, so a tensor left on the CPU is
found. They have no values, so an operator that reads a value, which synchronizes a GPU, fails too.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd_accel.cache.reader import StoredValues, decode_on
from kd_accel.data.transforms import CropFlip
from kd_accel.losses.distiller import Distiller, DistillerOutput, LossWeights
from kd_accel.losses.features import MSE, pooled_by_products
from kd_accel.losses.logits import KL
from kd_accel.losses.targets import PCA
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.average import MovingAverage
from kd_accel.training.metrics import Meters
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import set_learning_rate
from kd_accel.types import Batch
from tests.support.fake_cuda import autocast

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
MEAN, STD = [0.5] * 3, [0.25] * 3


def batch_on(device):
    index = np.arange(4)
    stored = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=device)
    images = CropFlip(32).on_device(stored, index, 1)
    return Batch(images, torch.zeros(4, dtype=torch.int64, device=device), torch.from_numpy(index).to(device), 1)


@pytest.mark.parametrize("use_bf16", [False, True])
@pytest.mark.parametrize("direction", ["both", "student_to_teacher", "teacher_to_student"])
def test_a_step_leaves_nothing_on_the_wrong_device(direction, use_bf16):
    with FakeTensorMode(), torch.device("cuda"):
        teacher, distiller = build_pair(MSE(direction=direction), use_bf16)
        distiller.start_recording()
        batch = batch_on("cuda")
        with autocast(use_bf16):
            target = teacher(batch)
            output = distiller(batch.images, target, batch.labels, LossWeights(features={"mse": 0.1}))
        meters = Meters(torch.device("cuda"), terms=distiller.term_names, has_teacher=True)
        meters.update(output, batch.labels)
        for tensor in (output.loss, *output.terms.values(), output.logits, target.logits, meters.sums, batch.images):
            assert tensor.device.type == "cuda"
        assert list(output.terms) == distiller.term_names == ["ce", "kl", "features/mse"]
        assert output.loss.dtype == output.logits.dtype == target.logits.dtype == torch.float32
        assert all(feature.dtype == (torch.bfloat16 if use_bf16 else torch.float32) for feature in target.features.values())
        distiller.stop_recording()
        teacher.close()


def build_pair(loss, use_bf16):
    """Build a live teacher and a distiller with one feature loss over all layers and fitted targets, all on the fake GPU."""
    student = build_model("torchvision/resnet18", num_classes=10)
    network = build_model("torchvision/resnet50", num_classes=10)
    ours, theirs = (probe_layers(model, LAYERS, image_size=32) for model in (student, network))
    targets = {layer: fitted(loss.target_function(ours[layer], theirs[layer]), theirs[layer]) for layer in LAYERS}
    distiller = Distiller(
        student,
        mean=MEAN,
        std=STD,
        logits=KL(),
        features={"mse": loss},
        layers={layer: layer for layer in LAYERS},
        target_shapes={layer: targets[layer].output_shape(theirs[layer]) for layer in LAYERS},
    )
    normalize = Normalize(MEAN, STD).to("cuda")
    return TeacherWithoutDigest(network, normalize, targets=targets, autocast=lambda: autocast(use_bf16)), distiller


class TeacherWithoutDigest(LiveTeacher):
    """Live teacher without a digest of its weights, because a fake tensor has no bytes."""

    def digest(self):
        return "fake"


def fitted(target, shape):
    if isinstance(target, PCA):
        target.load(FeatureProjector(shape[0], target.channels).state_dict())
    return target


def test_the_check_can_fail():
    with FakeTensorMode():
        images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            Normalize(MEAN, STD)(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_stored_outputs_are_decoded_on_the_device(dtype):
    with FakeTensorMode():
        scale = torch.ones(4, 3) if dtype == torch.int8 else None
        stored = StoredValues(torch.zeros(4, 3, 2, 2, dtype=dtype), scale)
        feature = decode_on(torch.device("cuda"), stored, torch.channels_last)
        assert feature.device.type == "cuda"
        assert feature.dtype == torch.float32
        assert feature.is_contiguous(memory_format=torch.channels_last)


class FakeAccelerator:
    """Accelerator with the attributes that a guard reads."""

    device, scaler, process_index = torch.device("cuda"), None, 0


def with_gradients():
    network = build_model("torchvision/resnet18", num_classes=10)
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    return network


def test_the_guard_and_the_average_read_nothing(monkeypatch):
    gradients = []
    # Autograd has no fake GPU.
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, gradient: gradients.append(gradient))
    with FakeTensorMode(), torch.device("cuda"):
        network = with_gradients()
        average, wrapped = MovingAverage(torch.nn.Identity(), decay=0.999), SimpleNamespace(optimizer=SimpleNamespace())
        # A fake network cannot be copied.
        average.module = build_model("torchvision/resnet18", num_classes=10).requires_grad_(False)
        guard = NonFiniteGuard(FakeAccelerator(), network, wrapped)
        batch = batch_on("cuda")
        logits = network(batch.images.float())
        ce = torch.nn.functional.cross_entropy(logits, batch.labels)
        guard.backward(DistillerOutput(ce, {"ce": ce}, logits, logits.detach()))
        assert guard.without_gradient() == []
        norm = guard.gradient_norm()
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), 1.0, norm)
        average.update(network, step=1)
        found_inf = wrapped.optimizer.found_inf
        for tensor in (*gradients, norm, found_inf, average.module.fc.weight):
            assert tensor.device.type == "cuda"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_update_reads_nothing(name):
    """Foreach kernels, with AdamW's step counts on the device, stand in for the fused kernels, which have no fake version."""
    with FakeTensorMode(), torch.device("cuda"):
        network = with_gradients()
        kind, own = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {"capturable": True})}[name]
        optimizer = kind(network.parameters(), lr=0.1, foreach=True, **own)
        set_learning_rate(optimizer, 0.05)
        optimizer.step()
        state = next(iter(optimizer.state.values()))
        assert state["momentum_buffer" if name == "sgd" else "exp_avg"].device.type == "cuda"


def test_torchs_average_reads_its_counter():
    """It is the reason for `MovingAverage`, and the proof that this check can fail."""
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
        target = PCA(2)
        target.update(torch.zeros(2, 3, 4, 4, device="cuda"))
        assert target._sums._outer.device.type == "cuda" and target._sums._outer.dtype == torch.float64
