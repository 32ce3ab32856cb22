"""Knowledge review: the loss at several scales, fusion from deep to shallow layers, order of the layers."""

import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.losses.review import Review, hcl_loss
from tests.support.feature_losses import random_maps
from tests.support.float64_feature_references import numeric_slope, reference_hcl, reference_review

STUDENT = {"stem": (3, 4, 4), "keys": (4, 4, 4), "deep.conv": (5, 2, 2), "deepest": (6, 1, 1)}
TEACHER = {"stem": (6, 4, 4), "keys": (4, 2, 2), "deep.conv": (7, 2, 2), "deepest": (8, 1, 1)}


def built(**settings):
    loss = Review(**settings)
    loss.build(STUDENT, TEACHER, seed=0)
    return loss.double()


@pytest.mark.parametrize(("size", "target_size"), [(8, 8), (8, 4), (4, 8), (2, 2), (1, 1)])
def test_hierarchical_context_loss_matches_its_reference(size, target_size):
    student, target = random_maps(2, 3, size, size).requires_grad_(), random_maps(2, 3, target_size, target_size, seed=1)
    value = hcl_loss(student, target)
    value.backward()
    direction = random_maps(2, 3, size, size, seed=2)
    assert value.item() == pytest.approx(reference_hcl(student.detach().numpy(), target.numpy()), rel=1e-12)
    slope = numeric_slope(lambda array: reference_hcl(array, target.numpy()), student.detach().numpy(), direction.numpy())
    assert (student.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_hierarchical_context_loss_is_zero_at_agreement():
    student = random_maps(2, 3, 7, 5).requires_grad_()
    value = hcl_loss(student, student.detach())
    value.backward()
    assert value.item() == 0 and not student.grad.any()


def test_scales_weigh_half_of_the_one_before():
    """A constant error is the same at each scale, and a checkerboard of errors vanishes in all means."""
    assert hcl_loss(torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)).item() == pytest.approx(1)
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert hcl_loss(board, torch.zeros(1, 1, 8, 8)).item() == pytest.approx(1 / (1 + 1 / 2 + 1 / 4 + 1 / 8))


def test_fusion_from_deep_to_shallow_matches_its_reference():
    loss = built(mid_channels=3)
    student = {layer: random_maps(2, *shape, seed=seed) for seed, (layer, shape) in enumerate(STUDENT.items())}
    target = {layer: random_maps(2, *shape, seed=9 + seed) for seed, (layer, shape) in enumerate(TEACHER.items())}
    keys = zip(STUDENT, loss.fusions, strict=True)
    states = {
        layer: {name: each.detach().numpy() for name, each in loss.fusions[key].state_dict().items()} for layer, key in keys
    }
    arrays = {layer: each.numpy() for layer, each in student.items()}
    targets = {layer: each.numpy() for layer, each in target.items()}
    leaf = student["deepest"].requires_grad_()
    # The order of the mapping does not matter after `build`.
    value = loss(dict(reversed(student.items())), target)
    value.backward()

    def reference(array):
        return reference_review(states, arrays | {"deepest": array}, targets)

    assert value.item() == pytest.approx(reference(arrays["deepest"]), rel=1e-12)
    direction = random_maps(2, *STUDENT["deepest"], seed=5)
    slope = numeric_slope(reference, leaf.detach().numpy(), direction.numpy())
    assert (leaf.grad * direction).sum().item() == pytest.approx(slope, rel=1e-6)
    assert all(each.grad is not None for each in loss.parameters())


def test_mid_channels_are_at_most_those_of_the_deepest_layer():
    widths = [built(**settings).fusions["stem"].reduce[0].out_channels for settings in ({}, {"mid_channels": 2})]
    assert widths == [6, 2]
    with pytest.raises(UserError, match="args.mid_channels: 0 is not valid"):
        Review.checked_settings({"mid_channels": 0}, field="args")


@pytest.mark.parametrize("size", [(4, 2), (2, 4)])
def test_layers_in_the_wrong_order_are_refused(size):
    shapes = {"deep": (8, 2, 2), "shallow": (4, *size)}
    with pytest.raises(UserError, match=r"shallow \(maps of .x.\) follows deep \(2x2\); list the layers from shallow to deep"):
        Review().build(shapes, shapes, seed=0)


def test_one_layer_has_no_attention():
    loss = Review()
    loss.build({"a": (4, 2, 2)}, {"a": (5, 2, 2)}, seed=0)
    assert sorted({name.split(".")[2] for name, _ in loss.named_parameters()}) == ["expand", "reduce"]
