"""Comparison of an export with its network: figures by hand, and each kind of wrong logits."""

import pytest
import torch

from kd_accel.deploy.parity import BATCH_SIZES, TOLERANCE, compare, measure_parity

EXPECTED = torch.tensor([[0.0, 10.0], [6.0, 5.99], [4.0, 0.0]], dtype=torch.float64)

WITH_NAN = torch.tensor([[0.0, 10.0], [6.0, torch.nan], [4.0, 0.0]], dtype=torch.float64)
"""Logits that are not finite where no class counts."""


def network(images):
    return torch.stack([images.float().mean((1, 2, 3)), images[:, 0, 0, 0].float()], 1)


@pytest.fixture
def images():
    return torch.randint(256, (23, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_figures():
    other = EXPECTED + torch.tensor([[0.0, 0.0], [-0.009, 0.006], [0.0, 0.0]])
    parity = compare(EXPECTED, [EXPECTED, other])
    assert (parity.samples, parity.logit_range, parity.other_classes) == (3, 10.0, 0)
    assert parity.largest_difference == pytest.approx(0.009) and parity.allowed == pytest.approx(0.01) and parity.holds
    assert "largest difference of the logits 0.009, 0.0009 of their range (at most 0.001)" in str(parity)


def test_a_class_counts_only_where_the_margin_is_clear():
    """Both samples have another class; the margin of one of them, 0.01, is within the tolerance of 2 * 0.01."""
    other = EXPECTED.clone()
    other[1:] = EXPECTED[1:].flip(1)
    assert compare(EXPECTED, [other]).other_classes == 1
    assert compare(EXPECTED, [EXPECTED, other, other]).other_classes == 1


@pytest.mark.parametrize(
    "logits",
    [EXPECTED.flip(1), EXPECTED + 1.01 * TOLERANCE * 10, WITH_NAN, EXPECTED[:, :1], EXPECTED[:2]],
    ids=["permuted classes", "a constant", "not finite", "another number of classes", "a missing sample"],
)
def test_wrong_logits_are_refused(logits):
    assert compare(EXPECTED, [EXPECTED]).holds
    assert not compare(EXPECTED, [EXPECTED, logits]).holds


def test_constant_logits_of_a_network():
    assert compare(torch.ones(3, 2), [torch.ones(3, 2)]).holds
    assert not compare(torch.ones(3, 2), [torch.ones(3, 2) + 1e-6]).holds
    assert compare(torch.arange(3.0)[:, None], [torch.arange(3.0)[:, None]]).holds, "one class"


def test_all_samples_pass_in_batches_of_one_and_seven(images):
    seen = []
    assert measure_parity(network, lambda batch: (seen.append(len(batch)), network(batch))[1], images).holds
    assert BATCH_SIZES == (1, 7) and seen == [1] * 23 + [7, 7, 7, 2]


@pytest.mark.parametrize("wrong", [1, 7, 2], ids=["batch of 1", "batch of 7", "last batch"])
def test_an_error_at_one_batch_size_is_found(images, wrong):
    assert not measure_parity(network, lambda batch: network(batch) + (len(batch) == wrong), images).holds
