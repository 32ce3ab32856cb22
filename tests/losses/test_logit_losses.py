"""Properties of all registered logit losses: extreme logits, dtypes, scalar temperatures, parts of a batch, settings."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_accel.errors import UserError
from kd_accel.losses.dist import DIST
from kd_accel.losses.distiller import Distiller, LossWeights
from kd_accel.losses.dkd import DKD
from kd_accel.losses.logits import KL
from kd_accel.losses.nkd import NKD
from kd_accel.losses.registry import build_loss, names
from kd_accel.types import TeacherOutput
from tests.support import models
from tests.support.float64_references import (
    LABELS,
    STUDENT,
    TEACHER,
    numeric_gradient,
    reference_standardized,
    value_and_gradient,
)

LOSSES = {
    "kl": (KL, {}),
    "kl-reverse": (KL, {"divergence": "reverse"}),
    "kl-js": (KL, {"divergence": "js"}),
    "kl-mse": (KL, {"divergence": "mse"}),
    "dkd": (DKD, {}),
    "dist": (DIST, {}),
    "nkd": (NKD, {}),
}
EXTREME = torch.tensor(
    [
        [1e4, -1e4, 0.0, 3.0],
        [-1e4, 1e4, 1e4, -1e4],
        [7.1, 7.1, 7.1, 7.1],
        [0.0, 0.0, 0.0, 0.0],
        [-1e4, -1e4, -1e4, 1e4],
        [0.5, -2.0, 1.0, 0.25],
    ]
)
every_loss = pytest.mark.parametrize("name", LOSSES)
with_and_without_scores = pytest.mark.parametrize("standardize", [False, True])


def build(name, **settings):
    kind, own = LOSSES[name]
    return kind(**own, **settings)


def compute(loss, student, teacher, labels=LABELS, temperature=2.0):
    """Compute a loss, and the gradient of the student's logits."""
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, teacher, temperature=temperature, labels=torch.as_tensor(labels))
    value.backward()
    return value.detach(), leaf.grad


def logits_of(dtype=torch.float64):
    return torch.tensor(STUDENT, dtype=dtype), torch.tensor(TEACHER, dtype=dtype)


def test_every_registered_loss_is_here():
    assert {kind.name for kind, _ in LOSSES.values()} == set(names("logits"))


@every_loss
@with_and_without_scores
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_finite_for_extreme_logits(name, standardize, temperature, dtype):
    """All pairs of rows: large logits of both signs, equal ones with and without rounding. Class 3 has no sample."""
    loss = build(name, standardize=standardize)
    student = EXTREME.repeat_interleave(len(EXTREME), 0).to(dtype)
    teacher = EXTREME.repeat(len(EXTREME), 1).to(dtype)
    labels = torch.arange(len(student)) % 4 - 1
    for part in (slice(None), slice(1), *(slice(first, first + 2) for first in range(0, len(student), 3))):
        value, gradient = compute(loss, student[part], teacher[part], labels[part], temperature)
        assert value.dtype == torch.float32 and value.shape == ()
        assert value.isfinite() and gradient.isfinite().all(), part


@every_loss
@with_and_without_scores
def test_temperature_may_be_a_scalar_tensor(name, standardize):
    loss, (student, teacher) = build(name, standardize=standardize), logits_of(torch.float32)
    value, gradient = compute(loss, student, teacher, temperature=0.7)
    same, same_gradient = compute(loss, student, teacher, temperature=torch.tensor(0.7))
    np.testing.assert_allclose(same, value, rtol=1e-5)
    np.testing.assert_allclose(same_gradient, gradient, rtol=1e-4, atol=1e-6)


class ReadValues(TorchDispatchMode):
    """Record of the operators in which the host reads a value of a tensor, which a CUDA graph does not allow."""

    def __init__(self):
        super().__init__()
        self.operators, self.readers = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if is_by_mask or name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"):
            self.readers.append(name)
        self.operators += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_reading_a_value_is_recorded():
    for read in (lambda ones: ones[0].item(), lambda ones: bool(ones[0]), lambda ones: ones[ones > 0]):
        with ReadValues() as record:
            read(torch.ones(2))
        assert record.readers


@pytest.mark.slow
@every_loss
@with_and_without_scores
def test_no_value_is_read_back_to_the_host(name, standardize):
    loss, temperature = build(name, standardize=standardize), torch.tensor(2.0)
    with ReadValues() as record:
        compute(loss, *logits_of(torch.float32), torch.tensor(LABELS), temperature)
    assert record.readers == [] and record.operators > 5


@every_loss
@with_and_without_scores
def test_half_precision_and_autocast_are_computed_in_float32(name, standardize):
    loss, (student, teacher) = build(name, standardize=standardize), logits_of(torch.bfloat16)
    value, gradient = compute(loss, student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = compute(loss, student.float(), teacher.float())
        half, half_gradient = compute(loss, student, teacher)
    assert torch.equal(inside, value) and torch.equal(half, value)
    assert half_gradient.dtype == torch.bfloat16 and torch.equal(half_gradient, gradient.bfloat16())


@every_loss
@with_and_without_scores
def test_per_sample_losses_are_means_over_the_parts_of_a_batch(name, standardize):
    loss, (student, teacher) = build(name, standardize=standardize), logits_of()
    labels = [0, -1, 2, 2, 1, 3]
    value, gradient = compute(loss, student, teacher, labels)
    parts = [compute(loss, student[part], teacher[part], labels[part]) for part in (slice(0, 3), slice(3, 6))]
    differences = [
        abs(value - sum(part for part, _ in parts) / 2).item(),
        (gradient - torch.cat([part for _, part in parts]) / 2).abs().max().item(),
    ]
    if loss.per_sample:
        assert max(differences) < 1e-10
    else:
        assert min(differences) > 1e-3


@every_loss
@with_and_without_scores
def test_agreement_is_a_minimum(name, standardize):
    """The loss is 0 for equal logits, and not lower for others. The target part of `nkd` has another minimum."""
    loss, (student, teacher) = build(name, standardize=standardize), logits_of()
    labels = [-1] * 6 if name == "nkd" else [0, -1, 2, 2, 1, 3]
    value, gradient = compute(loss, teacher, teacher.clone(), labels)
    assert gradient.abs().max() < 1e-14
    assert (value > 0.1) if name == "nkd" else (abs(value) < 1e-14)
    for step in (1e-3, 0.1, 1.0):
        assert compute(loss, teacher + step * student, teacher, labels)[0] > value


@every_loss
def test_standardize_replaces_logits_by_z_scores(name):
    _, teacher = logits_of()
    scores = torch.tensor(reference_standardized(TEACHER))

    def expected(student):
        loss = build(name)
        rows = torch.tensor(reference_standardized(student))
        return loss(rows, scores, temperature=0.7, labels=torch.tensor(LABELS)).item()

    value, gradient = value_and_gradient(
        lambda z: build(name, standardize=True)(z, teacher, temperature=0.7, labels=torch.tensor(LABELS)), STUDENT
    )
    assert value == pytest.approx(expected(STUDENT), rel=1e-10)
    np.testing.assert_allclose(gradient, numeric_gradient(expected, STUDENT), atol=1e-7)
    plain, _ = compute(build(name), *logits_of(), temperature=0.7)
    assert abs(plain - value) > 1e-3


@every_loss
def test_standardized_losses_do_not_change_with_scale_and_offset(name):
    """Sun et al. 2024, section 4.2: positive multiples and offsets of the logits of a sample, different on both sides."""
    loss, (student, teacher) = build(name, standardize=True), logits_of()
    scale, offset = torch.rand(6, 1).double() + 0.5, torch.randn(6, 1).double()
    value, gradient = compute(loss, student, teacher)
    moved, moved_gradient = compute(loss, scale * student + offset, 7 * teacher - 3)
    np.testing.assert_allclose(moved, value, rtol=1e-6)
    np.testing.assert_allclose(moved_gradient * scale, gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("kl", {"divergence": "mse", "t_squared": True}, "t_squared: has no effect (logits are not divided by T"),
        ("kl", {"divergence": "revers"}, "divergence: 'revers' is not valid: input should be 'kl', 'reverse', 'js' or 'mse'"),
        ("kl", {"standardize": 1}, "standardize: 1 is not valid"),
        ("dkd", {"alpha": -0.5}, "alpha: -0.5 is not valid: input should be greater than or equal to 0"),
        ("dkd", {"beta": float("nan")}, "beta: nan is not valid"),
        ("dkd", {"alpha": 0, "beta": 0}, "alpha: alpha and beta are 0, so that the loss is always 0; set one of them above 0"),
        ("dkd", {"temperature": 4.0}, "temperature: no such setting"),
        ("dist", {"beta": float("inf")}, "beta: inf is not valid"),
        ("dist", {"gamma": -1}, "gamma: -1 is not valid"),
        ("dist", {"beta": 0, "gamma": 0}, "beta: beta and gamma are 0, so that the loss is always 0; set one of them above 0"),
        ("nkd", {"gamma": "1.5"}, "gamma: '1.5' is not valid: input should be a valid number"),
        ("nkd", {"gamma": -1}, "gamma: -1 is not valid"),
    ],
)
def test_settings_out_of_range_are_refused(name, args, expected):
    with pytest.raises(UserError) as caught:
        build_loss("logits", name, args, field="distill.logits")
    assert str(caught.value).startswith(f"distill.logits.args.{expected}")


@pytest.mark.parametrize(
    ("name", "changed"),
    [("kl", {"t_squared": False}), ("dkd", {"alpha": 0.5}), ("dkd", {"beta": 0}), ("dist", {"beta": 2}), ("dist", {"gamma": 0})]
    + [("nkd", {"gamma": 0.0})],
)
def test_each_setting_has_an_effect(name, changed):
    value, _ = compute(build(name), *logits_of())
    other, _ = compute(build(name, **changed), *logits_of())
    assert abs(value - other) > 1e-3


@every_loss
def test_distiller_adds_the_loss_to_the_cross_entropy(name):
    """Labeled and unlabeled samples, with temperature and weight as scalar tensors."""
    loss = build(name, standardize=True)
    distiller = Distiller(models.student(5), mean=[0.5] * 3, std=[0.2] * 3, logits=loss, has_unlabeled=True)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    target, labels = TeacherOutput(torch.tensor(TEACHER).float()), torch.tensor([0, -1, 2, 2, -1, 3])
    weights = LossWeights(temperature=torch.tensor(3.0), alpha=torch.tensor(0.25))
    output = distiller(images, target, labels, weights)
    output.loss.backward()
    own = output.terms[loss.name]
    expected = loss(output.logits, target.logits, temperature=3.0, labels=labels)
    assert own.item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx((0.25 * own + 0.75 * output.terms["ce"]).item(), rel=1e-6)
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in distiller.parameters())


@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_mixed_labels_are_refused(name):
    loss = build(name)
    assert not loss.supports_mixed_labels
    with pytest.raises(ValueError, match=r"labels: must be the class of each sample, int64 \[B\]"):
        compute(loss, *logits_of(), torch.eye(5)[LABELS])
