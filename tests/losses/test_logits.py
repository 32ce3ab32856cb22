"""Losses on logits, against independent float64 references with gradients."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from kd_accel.losses.logits import (
    KL,
    cross_entropy,
    js_loss,
    kl_loss,
    log_softmax_outside,
    logit_mse_loss,
    reverse_kl_loss,
    standardized,
    true_class_mask,
)
from tests.support.float64_references import (
    LABELS,
    MIXED,
    STUDENT,
    TEACHER,
    numeric_gradient,
    reference_cross_entropy,
    reference_js,
    reference_kl,
    reference_logit_mse,
    reference_reverse_kl,
    reference_standardized,
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


@pytest.mark.parametrize("t_squared", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(
    ("divergence", "loss", "reference"),
    [("reverse", reverse_kl_loss, reference_reverse_kl), ("js", js_loss, reference_js)],
)
def test_divergence_value_and_gradient(divergence, loss, reference, temperature, t_squared):
    teacher, scale = torch.tensor(TEACHER), temperature**2 if t_squared else 1.0

    def expected(student):
        return scale * reference(student, TEACHER, temperature)

    value, gradient = value_and_gradient(lambda z: loss(z, teacher, temperature=temperature, t_squared=t_squared), STUDENT)
    assert value == pytest.approx(expected(STUDENT), rel=1e-10)
    np.testing.assert_allclose(gradient, numeric_gradient(expected, STUDENT), rtol=1e-6, atol=1e-8)
    module = KL(divergence=divergence, t_squared=t_squared)
    assert module(torch.tensor(STUDENT), teacher, temperature=temperature, labels=torch.tensor(LABELS)).item() == value


def test_logit_mse_value_and_gradient():
    teacher = torch.tensor(TEACHER)
    value, gradient = value_and_gradient(lambda student: logit_mse_loss(student, teacher), STUDENT)
    assert value == pytest.approx(reference_logit_mse(STUDENT, TEACHER), rel=1e-12)
    np.testing.assert_allclose(gradient, 2 * (STUDENT - TEACHER) / STUDENT.size, rtol=1e-12)
    for temperature in (0.5, 4.0):
        module = KL(divergence="mse")
        assert module(torch.tensor(STUDENT), teacher, temperature=temperature, labels=torch.tensor(LABELS)).item() == value


def test_divergences_are_related_as_their_definitions():
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    assert torch.equal(reverse_kl_loss(student, teacher, temperature=2.0), kl_loss(teacher, student, temperature=2.0))
    np.testing.assert_allclose(js_loss(student, teacher), js_loss(teacher, student), rtol=1e-12)
    certain = 1e4 * torch.eye(3)
    assert js_loss(certain, certain.roll(1, 0)).item() == pytest.approx(np.log(2), rel=1e-6)


def test_z_scores_are_those_of_the_reference():
    scores = standardized(torch.tensor(STUDENT))
    np.testing.assert_allclose(scores, reference_standardized(STUDENT), rtol=1e-12)
    assert scores.mean(1).abs().max() < 1e-15 and (scores.std(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_z_scores_of_half_precision_are_computed_in_float32(dtype):
    logits = torch.tensor(STUDENT).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = standardized(logits)
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores, reference_standardized(logits.double().numpy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("equal", [0.0, 0.1, -1e4 / 3])
@pytest.mark.parametrize("classes", [1, 7])
def test_equal_logits_have_the_z_score_zero_and_no_gradient(equal, classes):
    """Rounded means of 0.1 and -1e4 / 3 differ from these numbers."""
    logits = torch.full((2, classes), equal, requires_grad=True)
    scores = standardized(logits)
    (gradient,) = torch.autograd.grad((scores * torch.arange(classes)).sum(), logits)
    assert not scores.any() and not gradient.any()


def test_z_scores_keep_their_digits_next_to_a_large_offset():
    logits = torch.tensor([[0.0, 0.25, 1.0, -0.5]])
    np.testing.assert_allclose(standardized(logits + 2**16), standardized(logits), rtol=1e-6)


def test_distribution_outside_of_the_true_class():
    mask = true_class_mask(torch.tensor([2, -1, 0]), 3)
    assert mask.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    logits = torch.tensor([[-9e4, -9e4, 9e4], [2, 2, 2], [9, 0, 0]])
    probabilities = log_softmax_outside(mask, logits).exp()
    assert probabilities.numpy() == pytest.approx(np.array([[0.5, 0.5, 0], [1 / 3] * 3, [0, 0.5, 0.5]]), abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [LABELS, MIXED])
def test_cross_entropy_value_and_gradient(labels, smoothing):
    given = torch.tensor(labels)
    value, gradient = value_and_gradient(lambda z: cross_entropy(z, given, label_smoothing=smoothing), STUDENT)
    expected, expected_gradient = reference_cross_entropy(STUDENT, labels, smoothing)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_mixed_labels_is_torchs_with_probabilities(smoothing):
    is_labeled = MIXED.any(1)
    logits, labels = torch.tensor(STUDENT).float()[is_labeled], torch.tensor(MIXED).float()[is_labeled]
    value = cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.allclose(value, functional.cross_entropy(logits, labels, label_smoothing=smoothing), rtol=1e-6)
    certain = functional.one_hot(torch.tensor(LABELS)).float()
    value = cross_entropy(torch.tensor(STUDENT).float(), certain, label_smoothing=smoothing)
    expected = cross_entropy(torch.tensor(STUDENT).float(), torch.tensor(LABELS), label_smoothing=smoothing)
    assert torch.allclose(value, expected, rtol=1e-6)


def test_cross_entropy_of_a_batch_without_labels_is_zero():
    logits = torch.tensor(STUDENT, requires_grad=True)
    value = cross_entropy(logits, torch.zeros(6, 5), label_smoothing=0.1)
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_with_mixed_labels_is_finite_for_any_finite_logits(dtype):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-6e4, 6e4, 1.0]], dtype=dtype, requires_grad=True)
    value = cross_entropy(logits, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), label_smoothing=0.1)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, labels = torch.tensor(STUDENT).to(dtype), torch.tensor(TEACHER).to(dtype), torch.tensor(LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl, ce = kl_loss(student, teacher, temperature=2.0), cross_entropy(student, labels)
        mixed = cross_entropy(student, torch.tensor(MIXED).float())
    own, theirs = student.double().numpy(), teacher.double().numpy()
    assert kl.item() == pytest.approx(reference_kl(own, theirs, 2.0, True)[0], rel=1e-5)
    assert ce.item() == pytest.approx(reference_cross_entropy(own, LABELS, 0.0)[0], rel=1e-5)
    assert mixed.item() == pytest.approx(reference_cross_entropy(own, MIXED, 0.0)[0], rel=1e-5)
    assert kl.dtype == ce.dtype == mixed.dtype == torch.float32


def test_autocast_is_disabled_inside_losses():
    student, teacher, labels = torch.tensor(STUDENT).float(), torch.tensor(TEACHER).float(), torch.tensor(LABELS)
    outside = kl_loss(student, teacher, temperature=2.0), cross_entropy(student, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kl_loss(student, teacher, temperature=2.0), cross_entropy(student, labels)
    assert all(torch.equal(*values) for values in zip(inside, outside, strict=True))
