"""The teacher: frozen, with outputs that depend on nothing around it, and a fingerprint of what decides them."""

import pytest
import torch
import xxhash
from torch import nn

from kd_accel.data.dataset import samples_digest
from kd_accel.data.sources import MemoryImages
from kd_accel.io.hashing import settings_digest, tensors_digest
from kd_accel.losses.targets import PCA
from kd_accel.models.factory import build_model
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector
from kd_accel.teacher.teacher import LiveTeacher, Teacher, raw_targets
from kd_accel.types import Batch

NORMALIZE = Normalize([0.5] * 3, [0.25] * 3)
CPU = torch.device("cpu")


def network():
    return build_model("import:tests.support.models:teacher", num_classes=4)


def trained():
    """Return a network whose BatchNorm statistics differ from their initial values."""
    model = network().train()
    model(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def batch():
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(images, torch.arange(6) % 4, torch.arange(6), 0)


@pytest.fixture
def live():
    teacher = LiveTeacher(network().train(), NORMALIZE, targets=raw_targets(["layer1", "layer2"]))
    yield teacher
    teacher.close()


def test_the_teacher_is_in_evaluation_mode_regardless_of_calls_to_train(live):
    first = live(batch())
    before = live.digest()
    live.network.train()
    second = live(batch())
    assert not live.network.training
    assert torch.equal(first.logits, second.logits)
    assert live.digest() == before
    live.check_unchanged()


def test_neither_weights_nor_outputs_require_gradients(live):
    output = live(batch())
    assert not any(parameter.requires_grad for parameter in live.network.parameters())
    assert not output.logits.requires_grad
    projector = FeatureProjector(16, 4)
    projector(output.features["layer1"]).sum().backward()  # fails for tensors of inference mode
    assert projector.conv.weight.grad is not None


def test_features_are_the_targets_by_the_teachers_layers(live):
    raw = live(batch())
    assert {layer: tuple(feature.shape) for layer, feature in raw.features.items()} == {
        "layer1": (6, 16, 8, 8),
        "layer2": (6, 32, 2, 2),
    }
    expected = live.network(NORMALIZE(batch().images))
    assert torch.equal(raw.logits, expected) and raw.logits.dtype == torch.float32
    pca = PCA(4)
    pca.fit([raw.features["layer1"]])
    projected = LiveTeacher(network(), NORMALIZE, targets={"layer1": pca})
    features = projected(batch()).features
    assert features.keys() == {"layer1"} and torch.equal(features["layer1"], pca(raw.features["layer1"]))
    assert not pca.projector.conv.weight.requires_grad
    projected.close()


def test_the_forward_runs_in_its_own_autocast():
    live = LiveTeacher(network(), NORMALIZE, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    exact = LiveTeacher(network(), NORMALIZE)
    low, full = live(batch()).logits, exact(batch()).logits
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["layer1.0.weight", "layer1.1.running_mean", "layer1.1.num_batches_tracked"])
def test_a_changed_weight_or_buffer_is_detected(live, name):
    live.network.state_dict()[name].view(-1)[0] += 1
    with pytest.raises(AssertionError, match="changed during the training"):
        live.check_unchanged()


def test_close_removes_all_hooks():
    model = network()
    LiveTeacher(model, nn.Identity(), targets=raw_targets(["layer1"])).close()
    assert not model.layer1._forward_hooks


def test_the_fingerprint_depends_on_what_decides_the_outputs():
    def fingerprint(model=None, **changes):
        settings = {"mean": [0.5] * 3, "std": [0.2] * 3, "arch": "a", "stem": "imagenet", **changes}
        return Teacher(model or network(), **settings).fingerprint

    changed = network()
    changed.layer1[1].running_var[0] += 1e-6
    changes = [
        {"arch": "b"},
        {"arch": None},
        {"stem": "cifar"},
        {"arch_args": {"a": 1}},
        {"mean": [0.4] * 3},
        {"std": [0.3] * 3},
    ]
    found = [fingerprint(), fingerprint(changed), *(fingerprint(**change) for change in changes)]
    assert len(set(found)) == len(changes) + 2
    assert fingerprint(class_names=("x", "y", "z", "w")) == fingerprint() == found[0]
    assert Teacher(network(), [0.5] * 3, [0.2] * 3).fingerprint_fields()["weights"] == tensors_digest(network().state_dict())


@pytest.mark.parametrize("layers", [(), ("layer1", "layer2")])
def test_the_copy_for_a_device_has_the_same_outputs(layers):
    teacher = Teacher(trained(), [0.5] * 3, [0.25] * 3)
    before = teacher.fingerprint
    copy, normalize = teacher.on_device(CPU, layers=layers, image_size=32)
    live = LiveTeacher(copy, normalize, targets=raw_targets(layers))
    exact = LiveTeacher(trained(), NORMALIZE, targets=raw_targets(layers))
    found, expected = live(batch()), exact(batch())
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
    for layer in layers:
        torch.testing.assert_close(found.features[layer], expected.features[layer], atol=1e-5, rtol=1e-4)
    assert teacher.fingerprint == before and all(weight.requires_grad for weight in teacher.network.parameters())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in copy.modules())
    live.close()
    exact.close()


def test_batchnorm_is_fused_once_and_is_part_of_the_numerics():
    teacher = Teacher(trained(), [0.5] * 3, [0.25] * 3)
    assert teacher.fused(["layer2", "layer1"], image_size=32) is teacher.fused(["layer1", "layer2"], image_size=32)

    def numerics(device=CPU, layers=("layer1",), tf32=True, cpu_kernels="auto"):
        settings = {"precision": "bf16", "channels_last": None, "compiled": False, "tf32": tf32, "cpu_kernels": cpu_kernels}
        return teacher.numerics(device, layers=layers, image_size=32, **settings)

    expected = {"precision": "bf16", "channels_last": False, "compile": False, "conv_bn": "fused"}
    assert numerics() == numerics(tf32=False) == expected
    assert numerics(cpu_kernels="never") == {**expected, "cpu_kernels": "never"}
    assert numerics(layers=["layer1.0"]) == {**expected, "conv_bn": "separate"}
    assert numerics(torch.device("cuda")) == {**expected, "channels_last": True, "tf32": True}
    assert numerics(torch.device("cuda"), tf32=False) == {**expected, "channels_last": True}


def test_digests_depend_on_names_shapes_types_and_order():
    values = torch.arange(6.0)
    different = [
        {"a": values},
        {"b": values},
        {"a": values.view(2, 3)},
        {"a": values.double()},
        {"a": values.flip(0)},
        {"a": values, "b": torch.zeros(0)},
    ]
    assert len({tensors_digest(tensors) for tensors in different}) == 6
    assert tensors_digest({"a": values, "b": values}) == tensors_digest({"b": values, "a": values})
    assert settings_digest({"a": 1, "b": 2}) == settings_digest({"b": 2, "a": 1}) != settings_digest({"a": 1, "b": 3})


def test_the_digest_of_samples_depends_on_pixels_labels_and_order():
    pixels = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8).numpy()
    labels = torch.arange(8).numpy()
    samples = labels[:6]
    changed = pixels.copy()
    changed[3, 0, 0, 0] ^= 1
    relabeled = labels.copy()
    relabeled[2] = 5
    sets = [
        (pixels, labels, samples),
        (changed, labels, samples),
        (pixels, relabeled, samples),
        (pixels, labels, samples[::-1].copy()),
    ]
    assert len({samples_digest(MemoryImages(p, label, "ab"), order) for p, label, order in sets}) == 4


def test_the_digest_of_a_decoded_image_covers_its_pixels_in_order():
    pixels = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8).numpy()
    labels = torch.arange(8).numpy()
    expected = [xxhash.xxh3_64_intdigest(image.tobytes(), seed=label) for label, image in enumerate(pixels)]
    assert MemoryImages(pixels, labels, "ab").digests(labels).tolist() == expected


def test_float_pixels_are_accepted_and_normalized_images_refused():
    teacher, images = Teacher(trained(), [0.5] * 3, [0.25] * 3), batch().images
    assert torch.equal(teacher(images.float()).logits, teacher(images).logits)
    for refused in (NORMALIZE(images), images / 255, images.double()):
        with pytest.raises(TypeError, match="float32 in 0..255 as mixup makes them, not torch.float"):
            teacher(refused)
