"""Distillation from a stronger teacher, against an independent float64 reference with gradients."""

import numpy as np
import pytest
import torch

from kd_accel.losses.dist import DIST, dist_loss, pearson_distance
from tests.support.float64_references import (
    LABELS,
    STUDENT,
    TEACHER,
    numeric_gradient,
    reference_dist,
    softmax,
    value_and_gradient,
)

GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.0), (0.0, 3.0)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("samples", [2, 6])
def test_value_and_gradient(samples, temperature, beta, gamma):
    teacher = torch.tensor(TEACHER[:samples])
    value, gradient = value_and_gradient(
        lambda student: dist_loss(student, teacher, temperature=temperature, beta=beta, gamma=gamma), STUDENT[:samples]
    )

    def reference(student):
        return reference_dist(student, TEACHER[:samples], temperature, beta, gamma)

    assert value == pytest.approx(reference(STUDENT[:samples]), rel=1e-10)
    np.testing.assert_allclose(gradient, numeric_gradient(reference, STUDENT[:samples]), rtol=1e-5, atol=1e-7)


def test_module_equals_function():
    student, teacher, labels = torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS)
    value = DIST(beta=2.0, gamma=0.5)(student, teacher, temperature=3.0, labels=labels)
    assert torch.equal(value, dist_loss(student, teacher, temperature=3.0, beta=2.0, gamma=0.5))
    default = DIST()(student, teacher, temperature=3.0, labels=labels)
    assert torch.equal(default, dist_loss(student, teacher, temperature=3.0))
    assert not list(DIST().state_dict())


@pytest.mark.parametrize("dim", [0, 1])
def test_distance_does_not_change_with_positive_affine_maps(dim):
    """The relaxed match of the paper (section 4.1): a * u + b with a > 0, for each vector its own a and b."""
    first, second = (torch.rand(7, 5, generator=GENERATOR).double() for _ in range(2))
    scale, offset = (torch.rand(7, 5, generator=GENERATOR).double().narrow(dim, 0, 1) + 0.5 for _ in range(2))
    distance = pearson_distance(first, second, dim=dim)
    np.testing.assert_allclose(pearson_distance(first, scale * second + offset, dim=dim), distance, rtol=1e-10)
    np.testing.assert_allclose(pearson_distance(scale * first - offset, second, dim=dim), distance, rtol=1e-10)
    np.testing.assert_allclose(pearson_distance(first, -second, dim=dim), 2 - distance, rtol=1e-10)
    assert pearson_distance(first, scale * first + offset, dim=dim) < 1e-14
    assert (pearson_distance(first, second, dim=1 - dim) - distance).abs() > 1e-3


def test_distance_is_that_of_numpys_correlation():
    first, second = (torch.rand(4, 9, generator=GENERATOR).double() for _ in range(2))
    expected = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert pearson_distance(first, second, dim=1).item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_nearly_equal_vectors_keep_their_digits_in_float32():
    """The difference 1 - r would be a multiple of 6e-8 in float32."""
    first = torch.rand(4, 9, generator=GENERATOR).double()
    second = first + 1e-4 * torch.rand(4, 9, generator=GENERATOR).double()
    distance = pearson_distance(first, second, dim=1).item()
    assert distance < 1e-7
    assert pearson_distance(first.float(), second.float(), dim=1).item() == pytest.approx(distance, rel=1e-2)


@pytest.mark.parametrize("equal", [0.1, 1 / 3, 0.0, 1.0])
def test_equal_values_have_no_correlation_and_no_gradient(equal):
    """Rounded means of 0.1 and 1/3 differ from these numbers."""
    constant = torch.full((1, 7), equal, requires_grad=True)
    varied = torch.rand(1, 7, generator=GENERATOR)
    for other, expected in ((varied, 0.5), (constant.detach(), 0.0)):
        distance = pearson_distance(constant, other, dim=1)
        (gradient,) = torch.autograd.grad(distance, constant)
        assert distance.item() == pytest.approx(expected, rel=1e-6) and not gradient.any()


def test_single_sample_has_no_intra_class_part():
    student, teacher = torch.tensor(STUDENT[:1]), torch.tensor(TEACHER[:1])
    assert dist_loss(student, teacher, beta=0.0, gamma=1.0).item() == 0
    (q,), (p,) = softmax(STUDENT[:1]), softmax(TEACHER[:1])
    assert dist_loss(student, teacher, gamma=5.0).item() == pytest.approx(1 - np.corrcoef(q, p)[0, 1], rel=1e-10)
