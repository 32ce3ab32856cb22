"""Losses on feature maps, against independent float64 references with gradients, and the directions of `mse`."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kd_accel.bench.model_stats import count_macs
from kd_accel.errors import UserError
from kd_accel.losses.features import MSE, mse_loss, pooled_by_products
from kd_accel.models.projectors import FeatureProjector
from tests.support.float64_references import GENERATOR, STUDENT, TEACHER, value_and_gradient

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
NARROW, WIDE = (4, 8, 8), (16, 8, 8)


def built(loss, student, teacher, *, seed=0):
    """Build the parameters of a loss for shapes (D, H, W) by layer, with its own target functions."""
    targets = {layer: loss.target_function(shape, teacher[layer]) for layer, shape in student.items()}
    loss.build(student, {layer: target.output_shape(teacher[layer]) for layer, target in targets.items()}, seed=seed)
    return loss


def pooled(feature, factor):
    n, d, h, w = feature.shape
    return feature.reshape(n, d, h // factor, factor, w // factor, factor).mean((3, 5))


@pytest.mark.parametrize(("student_size", "target_size"), [(4, 4), (4, 2), (2, 4)])
def test_mse_value_and_gradient(student_size, target_size):
    student = GENERATOR.standard_normal((2, 3, student_size, student_size))
    target = GENERATOR.standard_normal((2, 3, target_size, target_size))
    size = min(student_size, target_size)
    small_student, small_target = pooled(student, student_size // size), pooled(target, target_size // size)
    difference = small_student - small_target
    factor = student_size // size
    expected_gradient = np.kron(2 * difference / difference.size, np.ones((factor, factor))) / factor**2
    value, gradient = value_and_gradient(lambda feature: mse_loss(feature, torch.tensor(target)), student)
    assert value == pytest.approx((difference**2).mean(), rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-14)


@pytest.mark.parametrize(("size", "pooled"), [((8, 8), (4, 4)), ((7, 5), (3, 4)), ((6, 6), (1, 1)), ((5, 5), (5, 2))])
def test_deterministic_pooling_equals_adaptive_pooling(size, pooled):
    # In float32 too: the tolerance is far below the error of TF32 matrix products, about a thousandth.
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        feature = torch.randn(3, 2, *size, dtype=dtype, requires_grad=True)
        own, expected = pooled_by_products(feature, pooled), nn.functional.adaptive_avg_pool2d(feature, pooled)
        assert own.dtype == dtype and torch.allclose(own, expected, rtol=0, atol=tolerance)
        weights = torch.randn_like(own)
        gradients = [torch.autograd.grad((each * weights).sum(), feature)[0] for each in (own, expected)]
        assert torch.allclose(*gradients, rtol=0, atol=tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_has_the_memory_format_of_the_map(memory_format):
    """A gradient of another format would be converted in each backward, which takes as long as the loss itself."""
    student, target = (torch.randn(2, 3, 4, 4).contiguous(memory_format=memory_format) for _ in range(2))
    gradients = []
    leaf = student.requires_grad_()
    # The gradient of a leaf is stored in the format of the leaf, so that of an intermediate tensor is recorded.
    feature = leaf * 1
    feature.register_hook(gradients.append)
    value = mse_loss(feature, target)
    value.backward()
    assert gradients[0].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(value, functional.mse_loss(student, target))
    torch.testing.assert_close(gradients[0], torch.autograd.grad(functional.mse_loss(leaf, target), leaf)[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_only_the_difference_is_saved_for_the_backward(memory_format):
    student, target = (torch.randn(2, 3, 4, 4).contiguous(memory_format=memory_format).requires_grad_() for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        mse_loss(student, target)
    (difference,) = [tensor for tensor in saved if tensor.numel() == student.numel()]
    assert torch.equal(difference.flatten().sort()[0], (student - target).flatten().sort()[0])


def test_gradients_of_student_and_target():
    student, target = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(mse_loss, (student, target))


def test_half_precision_is_computed_in_float32():
    student, teacher = (torch.tensor(each, dtype=torch.bfloat16)[:, :, None, None] for each in (STUDENT, TEACHER))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = mse_loss(student, teacher)
    assert value.item() == pytest.approx((student.double() - teacher.double()).square().mean().item(), rel=1e-6)
    assert value.dtype == torch.float32


def test_layers_are_summed():
    student = {"a": torch.zeros(1, 1, 2, 2), "b": torch.zeros(1, 1, 1, 2)}
    target = {"a": torch.ones(1, 1, 2, 2), "b": torch.tensor([3.0, 3.0]).view(1, 1, 1, 2)}
    assert MSE(direction="teacher_to_student")(student, target).item() == 10


@pytest.mark.parametrize(
    ("direction", "learned", "target"),
    [
        ("student_to_teacher", [(4, 16)], {"name": "identity"}),
        ("both", [(4, 4)], {"name": "pca", "channels": 4, "images": 2048}),
        ("teacher_to_student", [], {"name": "pca", "channels": 4, "images": 2048}),
    ],
)
def test_projectors_and_target_function_of_each_direction(direction, learned, target):
    loss = built(MSE(direction=direction), {"a.b": NARROW}, {"a.b": WIDE})
    widths = [(projector.conv.in_channels, projector.conv.out_channels) for projector in loss.projectors.values()]
    assert widths == learned
    assert loss.target_function(NARROW, WIDE).description() == target
    names = [f"projectors.a/b.conv.{name}" for name in ("weight", "bias")]
    assert list(loss.state_dict()) == (names if learned else [])


@pytest.mark.parametrize("direction", ["both", "teacher_to_student"])
def test_pca_that_would_add_channels_is_refused(direction):
    with pytest.raises(
        UserError,
        match=f"direction: {direction} cannot project the teacher's 4 channels to the student's 16, .*; use student_to_teacher",
    ):
        MSE(direction=direction).target_function(WIDE, NARROW)


def test_multiply_adds_of_learned_projectors():
    """At 32x32, ResNet-18 has 37 M multiply-adds; the projectors add about 4.2 M (student_to_teacher) or 1 M (both)."""
    sizes = (8, 4, 2, 1)
    student = {layer: (d, s, s) for layer, d, s in zip(LAYERS, (64, 128, 256, 512), sizes, strict=True)}
    teacher = {layer: (d, s, s) for layer, d, s in zip(LAYERS, (256, 512, 1024, 2048), sizes, strict=True)}
    for direction, expected in (("student_to_teacher", 4_194_304), ("both", 1_048_576)):
        projectors = built(MSE(direction=direction), student, teacher).projectors
        assert sum(count_macs(projectors[layer], torch.zeros(1, *student[layer])) for layer in LAYERS) == expected


@pytest.mark.parametrize("direction", ["both", "student_to_teacher"])
def test_initial_projectors_depend_on_seed_and_layer_only(direction):
    def weight(seed, layers):
        torch.manual_seed(seed * 77)
        before = torch.get_rng_state()
        shapes = {layer: NARROW for layer in layers}, {layer: WIDE for layer in layers}
        loss = built(MSE(direction=direction), *shapes, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert isinstance(loss.projectors["layer1"], FeatureProjector)
        return loss.projectors["layer1"].conv.weight

    assert torch.equal(weight(0, ["layer1"]), weight(0, ["layer2", "layer1"]))
    assert not torch.equal(weight(0, ["layer1"]), weight(1, ["layer1"]))
    both = built(MSE(direction=direction), {"a": NARROW, "b": NARROW}, {"a": WIDE, "b": WIDE}).projectors
    assert not torch.equal(both["a"].conv.weight, both["b"].conv.weight)


def test_gradient_of_a_learned_projector():
    torch.manual_seed(0)
    loss = built(MSE(direction="student_to_teacher"), {"layer": (3, 4, 4)}, {"layer": (5, 4, 4)}).double()
    feature, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    loss({"layer": feature}, {"layer": target}).backward()
    conv = loss.projectors["layer"].conv
    weight, bias = conv.weight[:, :, 0, 0].detach().numpy(), conv.bias.detach().numpy()
    samples = feature.numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    difference = samples @ weight.T + bias - target.numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    np.testing.assert_allclose(conv.weight.grad[:, :, 0, 0].numpy(), 2 / difference.size * difference.T @ samples, atol=1e-14)
    np.testing.assert_allclose(conv.bias.grad.numpy(), 2 / difference.size * difference.sum(0), atol=1e-14)


def test_layers_named_like_attributes_of_a_module():
    layers = ["keys", "values", "type", "training", "a.b"]
    loss = built(MSE(), {layer: NARROW for layer in layers}, {layer: WIDE for layer in layers})
    maps = {layer: torch.randn(2, *NARROW) for layer in layers}
    expected = sum(
        mse_loss(projector(maps[layer]), maps[layer]) for layer, projector in zip(layers, loss.projectors.values(), strict=True)
    )
    torch.testing.assert_close(loss(maps, maps), expected)
