"""The teacher is locked, answers alike whatever happens around it, and is recognized by what it is."""

import pytest
import torch
import xxhash
from torch import nn

from kd_accel.commands.teacher import TeacherNetwork
from kd_accel.data.dataset import samples_digest
from kd_accel.data.sources import MemoryImages
from kd_accel.io.hashing import settings_digest, tensors_digest
from kd_accel.models.factory import build_model
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import Batch

NORMALIZE = Normalize([0.5] * 3, [0.25] * 3)


def network():
    return build_model("import:tests.own_models:teacher", num_classes=4)


def batch():
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Batch(images, torch.arange(6) % 4, torch.arange(6), 0)


@pytest.fixture
def teacher():
    locked = LiveTeacher(network().train(), NORMALIZE, layers={"a": "layer1", "b": "layer2"})
    yield locked
    locked.close()


def test_it_is_in_evaluation_mode_whatever_calls_train(teacher):
    first = teacher(batch())
    before = teacher.digest()
    teacher.model.train()
    second = teacher(batch())
    assert not teacher.model.training
    assert torch.equal(first.logits, second.logits)
    assert teacher.digest() == before
    teacher.check_unchanged()


def test_nothing_of_it_asks_for_a_gradient(teacher):
    teacher_output = teacher(batch())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher_output.logits.requires_grad
    projector = FeatureProjector(16, 4)
    projector(teacher_output.features["a"]).sum().backward()  # fails for tensors of inference mode
    assert projector.conv.weight.grad is not None


def test_it_gives_raw_or_projected_features_by_the_students_layers(teacher):
    raw = teacher(batch()).features
    assert {layer: tuple(feature.shape) for layer, feature in raw.items()} == {"a": (6, 16, 8, 8), "b": (6, 32, 2, 2)}
    projector = FeatureProjector(16, 4)
    projected = LiveTeacher(network(), NORMALIZE, layers={"a": "layer1"}, projectors={"a": projector})
    assert torch.equal(projected(batch()).features["a"], projector(raw["a"]))
    assert not projector.conv.weight.requires_grad
    projected.close()


@pytest.mark.parametrize("name", ["layer1.0.weight", "layer1.1.running_mean", "layer1.1.num_batches_tracked"])
def test_a_changed_weight_or_buffer_is_noticed(teacher, name):
    teacher.model.state_dict()[name].view(-1)[0] += 1
    with pytest.raises(AssertionError, match="changed during the training"):
        teacher.check_unchanged()


def test_who_it_is_depends_on_what_decides_its_answers():
    def digest(model=None, arch="a", stem="imagenet", mean=0.5):
        return TeacherNetwork(model or network(), arch, stem, {}, [mean] * 3, [0.2] * 3, None).digest

    changed = network()
    changed.layer1[1].running_var[0] += 1e-6
    digests = [digest(), digest(changed), digest(arch="b"), digest(stem="cifar"), digest(mean=0.4)]
    assert len(set(digests)) == 5
    assert digest() == digests[0]


def test_digests_see_names_shapes_types_and_order():
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


def test_the_digest_of_samples_sees_pixels_labels_and_order():
    pixels = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8).numpy()
    labels = torch.arange(8).numpy()
    samples = labels[:6]
    changed = pixels.copy()
    changed[3, 0, 0, 0] ^= 1
    relabelled = labels.copy()
    relabelled[2] = 5
    sets = [
        (pixels, labels, samples),
        (changed, labels, samples),
        (pixels, relabelled, samples),
        (pixels, labels, samples[::-1].copy()),
    ]
    assert len({samples_digest(MemoryImages(p, label, "ab"), order) for p, label, order in sets}) == 4


def test_the_digest_of_a_decoded_image_is_of_its_pixels_in_their_order():
    pixels = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8).numpy()
    labels = torch.arange(8).numpy()
    expected = [xxhash.xxh3_64_intdigest(image.tobytes(), seed=label) for label, image in enumerate(pixels)]
    assert MemoryImages(pixels, labels, "ab").digests(labels).tolist() == expected


def test_no_hook_stays():
    model = network()
    LiveTeacher(model, nn.Identity(), layers={"a": "layer1"}).close()
    assert not model.layer1._forward_hooks
