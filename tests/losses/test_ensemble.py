"""The mean of several teachers against float64 formulas, and the distiller that compares a student with it."""

import math

import numpy as np
import pytest
import torch

import kd_accel as kd
from kd_accel.losses import Ensemble, combine_logits, confidences, kl_loss
from tests.support.models import student

GENERATOR = np.random.default_rng(3)
LOGITS = GENERATOR.normal(0, 3, (3, 5, 4))
"""Logits of three teachers for five samples and four classes."""
LABELS = [2, 0, -1, 3, 1]
WEIGHTS = [0.5, 2.0, 1.0]


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def mean_of_probabilities(logits, weights, temperature):
    """Probabilities [B][C], with weights [K][B]."""
    result = []
    for sample in range(len(logits[0])):
        own = [softmax([value / temperature for value in logits[k][sample]]) for k in range(len(logits))]
        total = sum(weights[k][sample] for k in range(len(logits)))
        result.append([sum(weights[k][sample] * own[k][c] for k in range(len(own))) / total for c in range(len(logits[0][0]))])
    return result


def confidences_of(logits, labels):
    """Weights [K][B] of Zhang et al. 2022, equation (3)."""
    result = [[0.0] * len(labels) for _ in logits]
    for sample, label in enumerate(labels):
        losses = [0.0 if label < 0 else -math.log(softmax(own[sample])[label]) for own in logits]
        for k, share in enumerate(softmax(losses)):
            result[k][sample] = (1 - share) / (len(logits) - 1)
    return result


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0, torch.tensor(4.0, dtype=torch.float64), 100.0])
def test_the_combined_logits_have_the_mean_of_the_softened_probabilities(temperature):
    combined = combine_logits(torch.tensor(LOGITS), torch.tensor(WEIGHTS), temperature=temperature)
    expected = mean_of_probabilities(LOGITS.tolist(), [[weight] * 5 for weight in WEIGHTS], float(temperature))
    np.testing.assert_allclose((combined / temperature).softmax(1), expected, rtol=1e-12, atol=1e-14)


def test_the_mean_of_logits_is_that_of_the_numbers():
    combined = combine_logits(torch.tensor(LOGITS), torch.tensor(WEIGHTS), temperature=4.0, mean="logits")
    expected = np.average(LOGITS, axis=0, weights=WEIGHTS)
    np.testing.assert_allclose(combined, expected, rtol=1e-12)


def test_a_teacher_without_weight_does_not_count():
    for mean in ("probabilities", "logits"):
        combined = combine_logits(torch.tensor(LOGITS), torch.tensor([0.0, 1.0, 0.0]), temperature=2.0, mean=mean)
        np.testing.assert_allclose(combined.log_softmax(1), torch.tensor(LOGITS[1]).log_softmax(1), rtol=1e-12)


def test_confidences_are_those_of_the_paper():
    own = confidences(torch.tensor(LOGITS), torch.tensor(LABELS))
    np.testing.assert_allclose(own, confidences_of(LOGITS.tolist(), LABELS), rtol=1e-12)
    np.testing.assert_allclose(own.sum(0), np.ones(5), rtol=1e-12)
    assert own[:, 2].tolist() == pytest.approx([1 / 3] * 3)  # a sample without a label


def test_mixed_labels_have_the_confidence_of_their_cross_entropy():
    """A row with one class is that label, a row of zeros no label, and two halves have the mean cross-entropy."""
    mixed = torch.nn.functional.one_hot(torch.tensor([2, 0, 0, 3, 1]), 4).double()
    mixed[2] = 0
    expected = confidences(torch.tensor(LOGITS), torch.tensor(LABELS))
    np.testing.assert_allclose(confidences(torch.tensor(LOGITS), mixed), expected)
    halves = torch.full((5, 4), 0.5, dtype=torch.float64)
    halves[:, 2:] = 0
    losses = -torch.tensor(LOGITS).log_softmax(2)[:, :, :2].mean(2)
    np.testing.assert_allclose(confidences(torch.tensor(LOGITS), halves), (1 - losses.softmax(0)) / 2, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_extreme_logits_give_finite_values(dtype, temperature, mean):
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]]).to(dtype)
    ensemble = Ensemble(("a", "b"), mean, confidence=True)
    members = dict(zip("ab", logits, strict=True))
    combined = ensemble(members, {"a": 1.0, "b": 0.5}, temperature=temperature, labels=torch.tensor([0]))
    assert combined.dtype == torch.float32 and combined.isfinite().all()
    predicted = torch.tensor([[0.2, -0.1, 0.3]], requires_grad=True)
    loss = kl_loss(predicted, combined, temperature=temperature)
    loss.backward()
    assert loss.isfinite() and predicted.grad.isfinite().all()


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_the_only_teacher_with_a_weight_may_have_no_confidence(mean):
    """Its share of the softmax is 1 to the rounding, so that the difference from 1 is 0."""
    members = {"a": torch.tensor([[20.0, 0.0, 0.0]]), "b": torch.tensor([[0.0, 5.0, 0.0]])}
    assert confidences(torch.stack([*members.values()]), torch.tensor([1]))[0] == 0
    combined = Ensemble(("a", "b"), mean, confidence=True)(members, {"b": 0.0}, temperature=1.0, labels=torch.tensor([1]))
    torch.testing.assert_close(combined.softmax(1), members["a"].softmax(1))


def test_weights_are_numbers_or_scalars_of_the_device():
    members = {name: torch.tensor(own) for name, own in zip("abc", LOGITS, strict=True)}
    numbers = Ensemble(("a", "b", "c"))(members, {"a": 0.5, "b": 2.0}, temperature=2.0)
    scalars = Ensemble(("a", "b", "c"))(members, {"a": torch.tensor(0.5), "b": torch.tensor(2.0)}, temperature=2.0)
    assert torch.equal(numbers, scalars)
    assert torch.equal(numbers, combine_logits(torch.tensor(LOGITS), torch.tensor(WEIGHTS), temperature=2.0))


def test_confidences_multiply_the_weights_of_the_teachers():
    members = {name: torch.tensor(own) for name, own in zip("abc", LOGITS, strict=True)}
    combined = Ensemble(("a", "b", "c"), confidence=True)(
        members, dict(zip("abc", WEIGHTS, strict=True)), temperature=2.0, labels=torch.tensor(LABELS)
    )
    own = confidences_of(LOGITS.tolist(), LABELS)
    weights = [[weight * value for value in row] for weight, row in zip(WEIGHTS, own, strict=True)]
    expected = mean_of_probabilities(LOGITS.tolist(), weights, 2.0)
    np.testing.assert_allclose((combined / 2).softmax(1), expected, rtol=1e-12, atol=1e-14)


def test_wrong_names_are_refused():
    for names in (("a",), ("a", "a")):
        with pytest.raises(ValueError, match="names: .* must be two or more different names"):
            Ensemble(names)
    with pytest.raises(ValueError, match=r"target\.members: lacks the logits of b"):
        Ensemble(("a", "b"))({"a": torch.zeros(1, 2)}, {}, temperature=1.0)


def test_the_distiller_compares_the_student_with_the_mean():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3])
    logits = torch.tensor(GENERATOR.normal(0, 3, (2, 4, 4)), dtype=torch.float32)
    target = kd.TeacherOutput(members={"a": logits[0], "b": logits[1]})
    weights = kd.losses.LossWeights(temperature=3.0, alpha=0.7, teachers={"a": 0.25, "b": 0.75})
    common = {"mean": [0.5] * 3, "std": [0.5] * 3, "logits": kd.losses.KL(), "image_size": 16}
    for ensemble in (Ensemble(("a", "b")), Ensemble(("a", "b"), "logits", confidence=True)):
        network = student(num_classes=4).eval()
        output = kd.Distiller(network, ensemble=ensemble, **common)(images, target, labels, weights)
        combined = ensemble(target.members, weights.teachers, temperature=3.0, labels=labels)
        one = kd.losses.LossWeights(temperature=3.0, alpha=0.7)
        single = kd.Distiller(network, **common)(images, kd.TeacherOutput(combined), labels, one)
        assert torch.equal(output.loss, single.loss) and torch.equal(output.teacher_logits, combined)
        with pytest.raises(ValueError, match=r"weights\.teachers: c not found among the names of the teachers \(a, b\)"):
            kd.Distiller(network, ensemble=ensemble, **common)(
                images, target, labels, kd.losses.LossWeights(teachers={"c": 1.0})
            )
        alone = kd.Distiller(network, **common)(images, kd.TeacherOutput(logits[0]), labels, one)
        assert not torch.equal(output.loss, alone.loss)
