"""Every loss against an independent float64 reference in numpy, its gradient against the formula written out by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kd_accel.config.schema import Schedule
from kd_accel.losses.distiller import DistillationLoss, plain_loss
from kd_accel.losses.features import feature_loss, feature_mse, pooled_by_products
from kd_accel.losses.logits import cross_entropy, kl_divergence
from kd_accel.training.schedules import schedule_value
from kd_accel.types import StudentOutput, TeacherOutput

GENERATOR = np.random.default_rng(0)
STUDENT = 3 * GENERATOR.standard_normal((6, 5))
TEACHER = 3 * GENERATOR.standard_normal((6, 5))
LABELS = np.array([0, 4, 2, 2, 1, 3])


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl_by_hand(student, teacher, temperature, t_squared):
    """(value, gradient with respect to the student's logits)."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    scale = temperature**2 if t_squared else 1.0
    return scale * (p * (np.log(p) - np.log(q))).sum() / len(p), scale * (q - p) / temperature / len(p)


def cross_entropy_by_hand(student, labels, smoothing):
    classes = student.shape[1]
    target = np.eye(classes)[labels] * (1 - smoothing) + smoothing / classes
    q = softmax(student)
    return -(target * np.log(q)).sum() / len(q), (q - target) / len(q)


def value_and_gradient(function, student, dtype=torch.float64):
    leaf = torch.tensor(student, dtype=dtype, requires_grad=True)
    value = function(leaf)
    value.backward()
    return value.item(), leaf.grad.double().numpy()


@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 4.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kl(temperature, t_squared, dtype, tolerance):
    teacher = torch.tensor(TEACHER, dtype=dtype)
    value, gradient = value_and_gradient(
        lambda student: kl_divergence(student, teacher, temperature=temperature, t_squared=t_squared), STUDENT, dtype
    )
    expected, expected_gradient = kl_by_hand(STUDENT, TEACHER, temperature, t_squared)
    assert value == pytest.approx(expected, rel=tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=20 * tolerance, atol=tolerance)


def test_kl_is_zero_when_the_two_agree():
    logits = torch.tensor(STUDENT, requires_grad=True)
    value = kl_divergence(logits, logits.detach().clone(), temperature=0.5, t_squared=True)
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().max() < 1e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_is_finite_for_any_finite_logits(dtype):
    student = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 1.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-3e4, 3e4, 5.0], [3e4, 3e4, 3e4]], dtype=dtype)
    value = kl_divergence(student, teacher, temperature=0.3, t_squared=False)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_kl_grows_towards_the_squared_distance_at_high_temperature():
    """Hinton et al. 2015, section 2.1: T^2 KL tends to |centerd difference|^2 / (2 C)."""
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    value = kl_divergence(student, teacher, temperature=1e4, t_squared=True)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert value.item() == pytest.approx((difference.square().sum(1) / 10).mean().item(), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    labels = torch.tensor(LABELS)
    value, gradient = value_and_gradient(lambda z: cross_entropy(z, labels, label_smoothing=smoothing), STUDENT)
    expected, expected_gradient = cross_entropy_by_hand(STUDENT, LABELS, smoothing)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-14)


def pooled(feature, factor):
    n, d, h, w = feature.shape
    return feature.reshape(n, d, h // factor, factor, w // factor, factor).mean((3, 5))


@pytest.mark.parametrize(("student_size", "target_size"), [(4, 4), (4, 2), (2, 4)])
def test_feature_distance(student_size, target_size):
    student = GENERATOR.standard_normal((2, 3, student_size, student_size))
    target = GENERATOR.standard_normal((2, 3, target_size, target_size))
    size = min(student_size, target_size)
    small_student, small_target = pooled(student, student_size // size), pooled(target, target_size // size)
    difference = small_student - small_target
    factor = student_size // size
    expected_gradient = np.kron(2 * difference / difference.size, np.ones((factor, factor))) / factor**2
    value, gradient = value_and_gradient(lambda feature: feature_mse(feature, torch.tensor(target)), student)
    assert value == pytest.approx((difference**2).mean(), rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-14)


@pytest.mark.parametrize(("size", "pooled"), [((8, 8), (4, 4)), ((7, 5), (3, 4)), ((6, 6), (1, 1)), ((5, 5), (5, 2))])
def test_deterministic_pooling_is_adaptive_pooling(size, pooled):
    """For CUDA's deterministic mode; in float32 too, where TF32 matrix products would differ by a thousandth."""
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        feature = torch.randn(3, 2, *size, dtype=dtype, requires_grad=True)
        own, expected = pooled_by_products(feature, pooled), nn.functional.adaptive_avg_pool2d(feature, pooled)
        assert own.dtype == dtype and torch.allclose(own, expected, rtol=0, atol=tolerance)
        weights = torch.randn_like(own)
        gradients = [torch.autograd.grad((each * weights).sum(), feature)[0] for each in (own, expected)]
        assert torch.allclose(*gradients, rtol=0, atol=tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_feature_gradient_lies_as_the_feature_does(memory_format):
    """Otherwise each backward would bring it into the other layout, and that costs as much as the loss itself."""
    student, target = (torch.randn(2, 3, 4, 4).contiguous(memory_format=memory_format) for _ in range(2))
    given = []
    leaf = student.requires_grad_()
    feature = leaf * 1  # a leaf's gradient is stored in the leaf's own layout: look at one further on
    feature.register_hook(given.append)
    value = feature_mse(feature, target)
    value.backward()
    assert given[0].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(value, functional.mse_loss(student, target))
    torch.testing.assert_close(given[0], torch.autograd.grad(functional.mse_loss(leaf, target), leaf)[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_of_two_features_only_their_difference_is_kept(memory_format):
    student, target = (torch.randn(2, 3, 4, 4).contiguous(memory_format=memory_format).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        feature_mse(student, target)
    (difference,) = [tensor for tensor in kept if tensor.numel() == student.numel()]
    assert torch.equal(difference.flatten().sort()[0], (student - target).flatten().sort()[0])


def test_a_target_gets_the_opposite_gradient():
    student, target = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(feature_mse, (student, target))


def test_layers_are_summed():
    pairs = {
        "a": (torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)),
        "b": (torch.zeros(1, 1, 1, 2), torch.tensor([3.0, 3.0]).view(1, 1, 1, 2)),
    }
    assert feature_loss(pairs).item() == 10


def test_half_types_are_computed_in_float32():
    student = torch.tensor(STUDENT, dtype=torch.bfloat16)
    teacher = torch.tensor(TEACHER, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = kl_divergence(student, teacher, temperature=2.0, t_squared=True)
        feature = feature_mse(student[:, :, None, None], teacher[:, :, None, None])
    assert value.item() == pytest.approx(kl_by_hand(student.double().numpy(), teacher.double().numpy(), 2.0, True)[0], rel=1e-5)
    assert feature.item() == pytest.approx(((student - teacher).float() ** 2).mean().item(), rel=1e-2)
    assert value.dtype == feature.dtype == torch.float32


def test_the_combination_is_the_references():
    pairs = {"layer1": (torch.tensor(STUDENT)[:, :, None, None], torch.tensor(TEACHER)[:, :, None, None])}
    leaf = torch.tensor(STUDENT, requires_grad=True)
    loss = DistillationLoss(temperature=0.5, alpha=0.7, feature_weight=0.1)
    terms = loss(StudentOutput(leaf, pairs), TeacherOutput(torch.tensor(TEACHER)), torch.tensor(LABELS))
    terms.total.backward()
    kl, kl_gradient = kl_by_hand(STUDENT, TEACHER, 0.5, True)
    hard, hard_gradient = cross_entropy_by_hand(STUDENT, LABELS, 0.0)
    feature = ((STUDENT - TEACHER) ** 2).mean()
    assert terms.total.item() == pytest.approx(0.7 * kl + 0.3 * hard + 0.1 * feature, rel=1e-12)
    assert (terms.hard.item(), terms.response.item(), terms.feature.item()) == pytest.approx((hard, kl, feature))
    np.testing.assert_allclose(leaf.grad.numpy(), 0.7 * kl_gradient + 0.3 * hard_gradient, atol=1e-14)


def test_a_weight_of_zero_still_reaches_the_projector():
    feature = torch.ones(2, 1, 1, 1, requires_grad=True)
    pairs = {"layer1": (feature, torch.zeros(2, 1, 1, 1))}
    loss = DistillationLoss(temperature=1.0, alpha=0.5, feature_weight=0.0)
    logits = torch.tensor(STUDENT[:2])
    loss(StudentOutput(logits, pairs), TeacherOutput(logits), torch.tensor(LABELS[:2])).total.backward()
    assert torch.equal(feature.grad, torch.zeros_like(feature))


def test_the_plain_loss_is_the_hard_term():
    logits, labels = torch.tensor(STUDENT), torch.tensor(LABELS)
    terms = plain_loss(0.1)(StudentOutput(logits), TeacherOutput(), labels)
    assert terms.total is terms.hard
    assert terms.hard.item() == pytest.approx(functional.cross_entropy(logits, labels, label_smoothing=0.1).item())
    assert terms.response is terms.feature is None


def schedule(schedule, total=10, steps_per_epoch=5):
    return [
        schedule_value(
            schedule, epoch=epoch, step=epoch * steps_per_epoch, total_epochs=total, total_steps=total * steps_per_epoch
        )
        for epoch in range(total)
    ]


def test_schedules():
    assert schedule(0.7) == [0.7] * 10
    assert schedule(Schedule(start=0.7, kind="constant")) == [0.7] * 10
    assert schedule(Schedule(start=0.5, floor=0.3, decay=0.95), 12) == pytest.approx(
        [max(0.3, 0.5 * 0.95**epoch) for epoch in range(12)]
    )
    assert schedule(Schedule(start=0.5, floor=0.3, decay=0.95), 12)[-1] == 0.3
    assert schedule(Schedule(start=1, end=0, kind="linear")) == pytest.approx([1 - epoch / 9 for epoch in range(10)])
    assert schedule(Schedule(start=1, end=0, kind="linear", length=5)) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    cosine = schedule(Schedule(start=4, end=2, kind="cosine"), 5)
    assert cosine == pytest.approx([4, 3 + np.cos(np.pi / 4), 3, 3 - np.cos(np.pi / 4), 2])
    by_step = schedule(Schedule(start=1, floor=0, decay=0.9, unit="step"))
    assert by_step == pytest.approx([0.9 ** (5 * epoch) for epoch in range(10)])
    assert schedule(Schedule(start=1, end=0, kind="linear"), total=1) == [1]
