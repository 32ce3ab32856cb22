"""The module that is trained: its input, its pairs with a teacher's features, and the same gradients when it is compiled."""

import numpy as np
import torch

from kd_accel.models.factory import build_model
from kd_accel.models.memory_format import image_memory_format, weight_memory_format
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import build_projectors
from kd_accel.models.student import StudentModule


def test_normalisation():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.25, 0.3]
    expected = (images.numpy() / 255 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    normalised = Normalize(mean, std)(images)
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(Normalize(mean, std)(images.float()), normalised)
    assert torch.equal(Normalize(mean, std)(images.contiguous()), normalised)
    assert Normalize(mean, std).state_dict() == {}


def test_layouts_are_those_of_the_device_where_a_config_leaves_them_open():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    last, contiguous = torch.channels_last, torch.contiguous_format
    assert [image_memory_format(None, device) for device in (cpu, gpu)] == [contiguous, last]
    assert [image_memory_format(setup, device) for device in (cpu, gpu) for setup in (True, False)] == [last, contiguous] * 2
    assert [weight_memory_format(setup, cpu) for setup in (None, True, False)] == [contiguous] * 3
    assert [weight_memory_format(setup, gpu) for setup in (None, True, False)] == [last, last, contiguous]


def test_the_student_module_pairs_layers_only_for_a_teacher():
    network = build_model("import:tests.own_models:student_with_everything", num_classes=4)
    projectors = build_projectors({"layer1": (8, 8, 8)}, {"layer1": (12, 8, 8)}, direction="student_to_teacher")
    module = StudentModule(network, Normalize([0.5] * 3, [0.2] * 3), layers=["layer1"], student_projectors=projectors.student)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    module.start_recording()
    target = torch.zeros(2, 12, 8, 8)
    logits, pairs = module(images, {"layer1": target})
    assert logits.shape == (2, 4)
    assert pairs["layer1"][0].shape == (2, 12, 8, 8)
    assert pairs["layer1"][1] is target
    assert module(images)[1] == {}
    module.stop_recording()
    assert not any(part._forward_hooks for part in network.modules())
    assert not any("normalize" in name for name in module.state_dict())


def wrapped():
    torch.manual_seed(1)
    network = build_model("import:tests.own_models:student", num_classes=4)
    shapes = {"layer1": (8, 8, 8), "layer2": (16, 2, 2)}, {"layer1": (12, 8, 8), "layer2": (20, 2, 2)}
    projectors = build_projectors(*shapes, direction="student_to_teacher").student
    module = StudentModule(network, Normalize([0.5] * 3, [0.2] * 3), layers=list(projectors), student_projectors=projectors)
    module.start_recording()
    return module


def test_the_whole_module_compiled_gives_the_same_gradients():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    features = {"layer1": torch.randn(4, 12, 8, 8), "layer2": torch.randn(4, 20, 2, 2)}
    plain, compiled = wrapped(), wrapped()
    compiled.compile(backend="aot_eager", fullgraph=True)
    for batch in (images, images.flip(0)):
        for module in (plain, compiled):
            module.zero_grad()
            logits, pairs = module(batch, features)
            (logits.square().sum() + sum((a - b).square().mean() for a, b in pairs.values())).backward()
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad)
    assert compiled(images)[1] == {}
