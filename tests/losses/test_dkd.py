"""Decoupled knowledge distillation, against an independent float64 reference with gradients."""

import numpy as np
import pytest
import torch

from kd_accel.losses.dkd import DKD, dkd_loss
from kd_accel.losses.logits import kl_loss
from tests.support.float64_references import LABELS, STUDENT, TEACHER, numeric_gradient, reference_dkd, value_and_gradient

UNLABELED = np.array([0, -1, 2, 2, -1, 3])


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.0, 2.0), (3.0, 0.0)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("labels", [LABELS, UNLABELED])
def test_value_and_gradient(labels, temperature, alpha, beta):
    teacher, given = torch.tensor(TEACHER), torch.tensor(labels)
    value, gradient = value_and_gradient(
        lambda student: dkd_loss(student, teacher, given, temperature=temperature, alpha=alpha, beta=beta), STUDENT
    )

    def reference(student):
        return reference_dkd(student, TEACHER, labels, temperature, alpha, beta)

    assert value == pytest.approx(reference(STUDENT), rel=1e-10)
    np.testing.assert_allclose(gradient, numeric_gradient(reference, STUDENT), rtol=1e-6, atol=1e-7)


def test_module_equals_function():
    student, teacher, labels = torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS)
    value = DKD(alpha=2.0, beta=0.5)(student, teacher, temperature=3.0, labels=labels)
    assert torch.equal(value, dkd_loss(student, teacher, labels, temperature=3.0, alpha=2.0, beta=0.5))
    default = DKD()(student, teacher, temperature=3.0, labels=labels)
    assert torch.equal(default, dkd_loss(student, teacher, labels, temperature=3.0))
    assert not list(DKD().state_dict())


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_parts_with_the_papers_weights_are_the_kl_divergence(temperature):
    """KL = TCKD + (1 - p) * NCKD for a sample whose true class has the teacher's probability p (equation 6)."""
    for student, teacher, label in zip(torch.tensor(STUDENT), torch.tensor(TEACHER), torch.tensor(LABELS), strict=True):
        batch = student[None], teacher[None]
        weight = 1 - (teacher / temperature).softmax(0)[label].item()
        value = dkd_loss(*batch, label[None], temperature=temperature, alpha=1.0, beta=weight)
        np.testing.assert_allclose(value, kl_loss(*batch, temperature=temperature), rtol=1e-10)


def test_sample_without_a_label_counts_with_the_divergence_of_all_classes():
    student, teacher, labels = torch.tensor(STUDENT), torch.tensor(TEACHER), torch.full((6,), -1)
    value = dkd_loss(student, teacher, labels, temperature=2.0, alpha=5.0, beta=8.0)
    np.testing.assert_allclose(value, 8 * kl_loss(student, teacher, temperature=2.0), rtol=1e-12)


def test_confident_networks_keep_all_digits():
    """The probability of the other classes is 1e-13, of which 1 - p in float32 has no digit."""
    student, teacher, labels = torch.tensor([[31.0, 1, 0]]), torch.tensor([[30.0, 0, 1]]), torch.tensor([0])
    value = dkd_loss(student, teacher, labels, alpha=1.0, beta=0.0).item()
    expected = reference_dkd(student.double().tolist(), teacher.double().tolist(), labels.tolist(), 1.0, 1.0, 0.0)
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dkd_loss(leaf, teacher, labels, alpha=1.0, beta=0.0), leaf)
    assert abs(value - expected) < 1e-12 and (gradient != 0).any()


def test_two_classes_have_no_divergence_within_the_others():
    student, teacher, labels = torch.tensor([[1.0, 2], [0, -3]]), torch.tensor([[5.0, 1], [0, 2]]), torch.tensor([0, 1])
    value = dkd_loss(student, teacher, labels, temperature=2.0, alpha=1.0, beta=8.0)
    np.testing.assert_allclose(value, kl_loss(student, teacher, temperature=2.0))
