"""Attention transfer: its target function, scales, sizes of maps, and powers."""

import numpy as np
import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.losses.attention import AT, AttentionMap, at_loss
from kd_accel.losses.features import MSE
from kd_accel.losses.targets import build_target
from tests.support.feature_losses import random_maps
from tests.support.float64_feature_references import numeric_slope, reference_at, reference_attention


@pytest.mark.parametrize("p", [1, 1.5, 2, 4])
def test_each_power_matches_the_reference_with_its_gradient(p):
    student, teacher = random_maps(3, 4, 4, 2).requires_grad_(), random_maps(3, 5, 2, 4, seed=1)
    target = AttentionMap(p)(teacher)
    np.testing.assert_allclose(target.numpy(), reference_attention(teacher.numpy(), p), rtol=1e-12)
    value = at_loss(student, target, p=p)
    value.backward()
    direction = random_maps(3, 4, 4, 2, seed=2)

    def reference(array):
        return reference_at(array, target.numpy(), p)

    assert value.item() == pytest.approx(reference(student.detach().numpy()), rel=1e-12)
    slope = numeric_slope(reference, student.detach().numpy(), direction.numpy())
    assert (student.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_attention_ignores_the_sign_and_the_positive_scale_of_each_map():
    student, teacher = random_maps(3, 4, 4, 4), random_maps(3, 5, 4, 4, seed=1)
    scales = torch.tensor([1e-9, 1.0, 1e9], dtype=torch.float64)[:, None, None, None]
    expected = at_loss(student, AttentionMap()(teacher))
    for scale in (scales, -scales, scales.flip(0)):
        torch.testing.assert_close(at_loss(student * scale, AttentionMap()(teacher / scale)), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(at_loss(student, 7 * AttentionMap()(teacher)), expected, rtol=1e-12, atol=0)


def test_powers_of_large_maps_do_not_overflow():
    student = (1e8 * random_maps(2, 4, 3, 3, dtype=torch.float32)).requires_grad_()
    value = at_loss(student, AttentionMap(4)(1e8 * random_maps(2, 4, 3, 3, seed=1, dtype=torch.float32)), p=4)
    value.backward()
    assert 0.1 < value.item() < 1.5 and student.grad.isfinite().all() and student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_of_a_half_precision_map_is_float32(dtype):
    feature = (100 * random_maps(2, 64, 4, 4)).to(dtype)
    found = AttentionMap()(feature)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), AttentionMap()(feature.double()), rtol=1e-5, atol=1e-7)


def test_attention_map_of_zeros_is_zero():
    assert not AttentionMap()(torch.zeros(2, 3, 4, 4)).any()


def test_target_has_one_channel_and_is_rebuilt_from_its_description():
    target = AT(p=3).target_function((8, 4, 4), (256, 8, 8))
    assert target.output_shape((256, 8, 8)) == (1, 8, 8) == tuple(target(torch.rand(2, 256, 8, 8)).shape[1:])
    rebuilt = build_target(target.description())
    feature = random_maps(2, 6, 3, 3)
    assert type(rebuilt) is AttentionMap and rebuilt.description() == target.description() == {"name": "attention", "p": 3.0}
    assert torch.equal(rebuilt(feature), target(feature)) and not torch.equal(rebuilt(feature), AttentionMap(2)(feature))
    assert repr(AttentionMap(2).description()) == repr(AttentionMap(2.0).description())


@pytest.mark.parametrize("p", [0.5, -1, float("nan"), float("inf"), None, "two"])
def test_a_power_below_one_or_of_a_damaged_description_is_refused(p):
    with pytest.raises((ValueError, TypeError)):
        build_target({"name": "attention", "p": p})


@pytest.mark.parametrize("p", [0.5, 5, float("nan"), float("inf"), "2", True])
def test_a_power_outside_of_its_range_is_refused(p):
    with pytest.raises(UserError, match="distill.features.at.args.p: "):
        AT.checked_settings({"p": p}, field="distill.features.at.args")


@pytest.mark.parametrize(("student_size", "teacher_size"), [((1, 1), (1, 1)), ((4, 4), (1, 1)), ((1, 4), (4, 1))])
def test_maps_of_one_pixel_are_refused(student_size, teacher_size):
    with pytest.raises(UserError, match="p: has no effect on maps of one pixel, .*; compare layers with larger maps"):
        AT().target_function((4, *student_size), (8, *teacher_size))
    assert AT().target_function((4, 1, 2), (8, 4, 4)).description()["name"] == "attention"


def test_at_and_mse_need_different_targets_of_a_layer():
    """The program refuses a layer with two targets, by their descriptions."""
    shapes = (8, 4, 4), (16, 4, 4)
    descriptions = [loss.target_function(*shapes).description() for loss in (AT(), AT(p=3), MSE())]
    assert len({repr(each) for each in descriptions}) == 3
