"""Normalized knowledge distillation, against an independent float64 reference with gradients."""

import numpy as np
import pytest
import torch

from kd_accel.losses.nkd import NKD, nkd_loss
from tests.support.float64_references import LABELS, STUDENT, TEACHER, numeric_gradient, reference_nkd, value_and_gradient

UNLABELED = np.array([0, -1, 2, 2, -1, 3])


@pytest.mark.parametrize("gamma", [1.5, 0.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("labels", [LABELS, UNLABELED])
def test_value_and_gradient(labels, temperature, gamma):
    teacher, given = torch.tensor(TEACHER), torch.tensor(labels)
    value, gradient = value_and_gradient(
        lambda student: nkd_loss(student, teacher, given, temperature=temperature, gamma=gamma), STUDENT
    )

    def reference(student):
        return reference_nkd(student, TEACHER, labels, temperature, gamma)

    assert value == pytest.approx(reference(STUDENT), rel=1e-10)
    np.testing.assert_allclose(gradient, numeric_gradient(reference, STUDENT), rtol=1e-6, atol=1e-7)


def test_module_equals_function():
    student, teacher, labels = torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS)
    value = NKD(gamma=0.5)(student, teacher, temperature=3.0, labels=labels)
    assert torch.equal(value, nkd_loss(student, teacher, labels, temperature=3.0, gamma=0.5))
    default = NKD()(student, teacher, temperature=3.0, labels=labels)
    assert torch.equal(default, nkd_loss(student, teacher, labels, temperature=3.0))
    assert not list(NKD().state_dict())


def test_temperature_does_not_soften_the_target_part():
    student, teacher, labels = torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS)
    values = [nkd_loss(student, teacher, labels, temperature=temperature, gamma=0.0) for temperature in (0.05, 1.0, 9.0)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[1], values[2])


def test_logit_of_the_true_class_has_no_part_in_the_distribution_of_the_others():
    """The gradient of the non-target part is 0 there, and the part does not change with it."""
    student, teacher, labels = torch.tensor(STUDENT, requires_grad=True), torch.tensor(TEACHER), torch.tensor(LABELS)

    def others(logits, reference):
        arguments = {"labels": labels, "temperature": 2.0}
        return nkd_loss(logits, reference, **arguments) - nkd_loss(logits, reference, **arguments, gamma=0.0)

    value = others(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    at_true = torch.eye(5).bool()[LABELS]
    assert gradient[at_true].abs().max() < 1e-15 and (gradient[~at_true] != 0).all()
    assert others(student + 9 * at_true, teacher - 4 * at_true).item() == pytest.approx(value.item(), rel=1e-10)


def test_non_target_part_is_least_where_the_distributions_of_the_others_agree():
    """The logits of the other classes differ by a constant, and those of the true class by any number."""
    teacher, labels = torch.tensor(TEACHER), torch.tensor(LABELS)
    shift = torch.arange(6.0).double()[:, None] + 3 * torch.eye(5).double()[LABELS]
    student = (teacher + shift).requires_grad_()
    value = nkd_loss(student, teacher, labels, temperature=2.0) - nkd_loss(student, teacher, labels, gamma=0.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert value > 0.1 and gradient.abs().max() < 1e-14
