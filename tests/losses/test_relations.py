"""Losses over the relations of the samples in a batch (rkd, sp, pkt): invariances, equal samples, settings, target function."""

import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.losses.pkt import PKT, pkt_loss
from kd_accel.losses.rkd import RKD, rkd_loss
from kd_accel.losses.sp import SP, sp_loss
from kd_accel.losses.targets import Identity, SpatialMean, build_target
from tests.support.feature_losses import random_maps
from tests.support.float64_feature_references import reference_rkd

RELATIONS = {"rkd": rkd_loss, "sp": sp_loss, "pkt": pkt_loss}


@pytest.mark.parametrize("name", RELATIONS)
def test_positive_scales_change_nothing(name):
    student, teacher = random_maps(5, 4, 3, 3), random_maps(5, 6, 2, 2, seed=1)
    expected = RELATIONS[name](student, teacher).item()
    assert expected > 1e-4
    for scale in (1e-6, 1e6):
        assert RELATIONS[name](scale * student, teacher).item() == pytest.approx(expected, rel=1e-10)
        assert RELATIONS[name](student, scale * teacher).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", RELATIONS)
def test_rotations_of_the_channels_change_nothing(name):
    student, teacher = random_maps(5, 4, 3, 3), random_maps(5, 6, 2, 2, seed=1)
    rotation, _ = torch.linalg.qr(random_maps(4, 4, seed=2))
    rotated = torch.einsum("bdhw,ed->behw", student, rotation)
    assert RELATIONS[name](rotated, teacher).item() == pytest.approx(RELATIONS[name](student, teacher).item(), rel=1e-10)


@pytest.mark.parametrize("name", RELATIONS)
def test_a_rotated_and_scaled_copy_agrees(name):
    """Equal relations are a loss of 0, also between different numbers of channels."""
    student = random_maps(5, 4, 3, 3)
    embedding, _ = torch.linalg.qr(random_maps(6, 4, seed=2))
    assert RELATIONS[name](3 * student, torch.einsum("bdhw,ed->behw", student, embedding)).item() < 1e-14


def test_translations_change_only_directions_from_the_origin():
    student, teacher = random_maps(5, 4, 3, 3), random_maps(5, 6, 2, 2, seed=1)
    moved = student + random_maps(1, 4, 1, 1, seed=3)
    assert rkd_loss(moved, teacher).item() == pytest.approx(rkd_loss(student, teacher).item(), rel=1e-10)
    for loss in (sp_loss, pkt_loss):
        assert loss(moved, teacher).item() != pytest.approx(loss(student, teacher).item(), rel=1e-3)


def test_lengths_of_single_embeddings_change_nothing_in_pkt():
    student, teacher = random_maps(5, 4, 3, 3), random_maps(5, 6, 2, 2, seed=1)
    lengths = random_maps(5, 1, 1, 1, seed=4).exp()
    assert pkt_loss(student * lengths, teacher).item() == pytest.approx(pkt_loss(student, teacher).item(), rel=1e-10)


def test_opposite_directions_have_a_finite_divergence():
    student = torch.tensor([[1.0], [-1.0], [-2.0]])[:, :, None, None].requires_grad_()
    value = pkt_loss(student, random_maps(3, 4, 1, 1, dtype=torch.float32))
    value.backward()
    assert value.isfinite() and value > 0 and student.grad.isfinite().all()


def test_similarities_of_large_maps_do_not_overflow():
    """Products of such maps are near 1e26, and their squares are above the range of float32."""
    student, teacher = (random_maps(5, 4, 3, 3, seed=seed, dtype=torch.float32) for seed in (0, 1))
    large = (1e12 * student).requires_grad_()
    value = sp_loss(large, 1e12 * teacher)
    value.backward()
    assert value.item() == pytest.approx(sp_loss(student, teacher).item(), rel=1e-5) and large.grad.any()


def test_order_of_the_samples_changes_nothing():
    student, teacher, order = random_maps(5, 4, 2, 2), random_maps(5, 6, 2, 2, seed=1), torch.tensor([3, 0, 4, 1, 2])
    for loss in RELATIONS.values():
        assert loss(student[order], teacher[order]).item() == pytest.approx(loss(student, teacher).item(), rel=1e-12)
        assert loss(student[order], teacher).item() != pytest.approx(loss(student, teacher).item(), rel=1e-3)


@pytest.mark.parametrize(("lambda_d", "lambda_a"), [(1.0, 0.0), (0.0, 1.0), (2.0, 3.0)])
def test_weights_of_distances_and_angles(lambda_d, lambda_a):
    student, teacher = random_maps(4, 3, 2, 2), random_maps(4, 5, 2, 2, seed=1)
    loss = RKD(lambda_d=lambda_d, lambda_a=lambda_a)
    value = loss({"layer": student}, {"layer": SpatialMean()(teacher)})
    assert value.item() == pytest.approx(reference_rkd(student.numpy(), teacher.numpy(), lambda_d, lambda_a), rel=1e-12)


def test_distances_far_from_the_mean_cost_linearly():
    """Two samples far apart among equal ones: relative distances differ by more than 1, where the Huber loss is linear."""
    student = torch.tensor([0.0, 0.01, 0.02, 100.0], dtype=torch.float64).view(4, 1, 1, 1)
    teacher = random_maps(4, 3, 1, 1)
    expected = reference_rkd(student.numpy(), teacher.numpy(), 1, 0)
    assert rkd_loss(student, teacher, lambda_d=1, lambda_a=0).item() == pytest.approx(expected, rel=1e-12)


def test_equal_samples_of_the_student_are_pushed_apart_gently():
    student = random_maps(4, 3, 1, 1)
    student[1] = student[0]
    student.requires_grad_()
    value = rkd_loss(student, random_maps(4, 5, 1, 1, seed=1))
    value.backward()
    assert value.isfinite() and 0 < student.grad.abs().max() < 1e3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lambda_d": 0, "lambda_a": 0}, "args.lambda_d: 0 leaves no loss, because lambda_a is 0 too; set one of them above 0"),
        ({"lambda_d": -1.0}, "args.lambda_d: -1.0 is not valid"),
        ({"lambda_a": float("nan")}, "args.lambda_a: nan is not valid"),
        ({"lambda_a": float("inf")}, "args.lambda_a: inf is not valid"),
        ({"distance_weight": 25}, "args.distance_weight: no such setting; use one of lambda_d, lambda_a"),
    ],
)
def test_settings_without_a_loss_or_out_of_range_are_refused(args, message):
    with pytest.raises(UserError) as caught:
        RKD.checked_settings(args, field="args")
    assert str(caught.value).startswith(message)


def test_targets_are_pooled_where_the_pooled_map_suffices():
    """A cache of `rkd` and `pkt` stores D values for each image; the similarities of `sp` need the map itself."""
    shapes = (8, 4, 4), (256, 8, 8)
    assert type(SP().target_function(*shapes)) is Identity
    feature = random_maps(2, 256, 8, 8)
    for loss in (RKD(), PKT()):
        target = loss.target_function(*shapes)
        assert target.output_shape(shapes[1]) == (256, 1, 1) == tuple(target(feature).shape[1:])
        assert type(build_target(target.description())) is SpatialMean
        torch.testing.assert_close(target(feature), feature.mean((2, 3), keepdim=True))
        assert target(feature.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="not a known target function"):
        build_target({"name": "mean", "p": 2})


@pytest.mark.parametrize("name", ["rkd", "pkt"])
def test_target_gives_the_loss_of_the_map(name):
    student, teacher = random_maps(5, 4, 3, 3), random_maps(5, 6, 2, 2, seed=1)
    assert RELATIONS[name](student, SpatialMean()(teacher)).item() == pytest.approx(RELATIONS[name](student, teacher).item())
