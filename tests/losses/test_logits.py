"""Losses on logits, against independent float64 references with gradients."""

import numpy as np
import pytest
import torch

from kd_accel.losses.logits import KL, cross_entropy, kl_loss
from tests.support.float64_references import (
    LABELS,
    STUDENT,
    TEACHER,
    reference_cross_entropy,
    reference_kl,
    value_and_gradient,
)


@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 4.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kl_value_and_gradient(temperature, t_squared, dtype, tolerance):
    teacher = torch.tensor(TEACHER, dtype=dtype)
    value, gradient = value_and_gradient(
        lambda student: kl_loss(student, teacher, temperature=temperature, t_squared=t_squared), STUDENT, dtype
    )
    expected, expected_gradient = reference_kl(STUDENT, TEACHER, temperature, t_squared)
    assert value == pytest.approx(expected, rel=tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=20 * tolerance, atol=tolerance)


@pytest.mark.parametrize("t_squared", [True, False])
def test_module_equals_function(t_squared):
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    value = KL(t_squared=t_squared)(student, teacher, temperature=0.5, labels=torch.tensor(LABELS))
    assert torch.equal(value, kl_loss(student, teacher, temperature=0.5, t_squared=t_squared))
    assert not list(KL().state_dict())


def test_kl_of_equal_logits_is_zero():
    logits = torch.tensor(STUDENT, requires_grad=True)
    value = kl_loss(logits, logits.detach().clone(), temperature=0.5)
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().max() < 1e-16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kl_is_finite_for_any_finite_logits(dtype):
    student = torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 1.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-3e4, 3e4, 5.0], [3e4, 3e4, 3e4]], dtype=dtype)
    value = kl_loss(student, teacher, temperature=0.3, t_squared=False)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_kl_approaches_the_squared_distance_at_high_temperature():
    """T^2 KL approaches |centered difference|^2 / (2 C) (Hinton et al. 2015, section 2.1)."""
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    value = kl_loss(student, teacher, temperature=1e4)
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert value.item() == pytest.approx((difference.square().sum(1) / 10).mean().item(), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_value_and_gradient(smoothing):
    labels = torch.tensor(LABELS)
    value, gradient = value_and_gradient(lambda z: cross_entropy(z, labels, label_smoothing=smoothing), STUDENT)
    expected, expected_gradient = reference_cross_entropy(STUDENT, LABELS, smoothing)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, labels = torch.tensor(STUDENT).to(dtype), torch.tensor(TEACHER).to(dtype), torch.tensor(LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl, ce = kl_loss(student, teacher, temperature=2.0), cross_entropy(student, labels)
    own, theirs = student.double().numpy(), teacher.double().numpy()
    assert kl.item() == pytest.approx(reference_kl(own, theirs, 2.0, True)[0], rel=1e-5)
    assert ce.item() == pytest.approx(reference_cross_entropy(own, LABELS, 0.0)[0], rel=1e-5)
    assert kl.dtype == ce.dtype == torch.float32


def test_autocast_is_disabled_inside_losses():
    student, teacher, labels = torch.tensor(STUDENT).float(), torch.tensor(TEACHER).float(), torch.tensor(LABELS)
    outside = kl_loss(student, teacher, temperature=2.0), cross_entropy(student, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kl_loss(student, teacher, temperature=2.0), cross_entropy(student, labels)
    assert all(torch.equal(*values) for values in zip(inside, outside, strict=True))
