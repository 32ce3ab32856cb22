"""Projectors: gradients against formulas written out by hand in float64, and the PCA where it is numerically hard."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_accel.losses.feature import feature_loss
from kd_accel.models.projectors import FeatureProjector, NormalizedProjector, PcaFit
from kd_accel.models.student import StudentModule
from kd_accel.models.taps import probe_taps


def test_a_learned_projectors_gradient_through_the_feature_loss():
    torch.manual_seed(0)
    projector = FeatureProjector(3, 5).double()
    feature, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    feature_loss({"tap": (projector(feature), target)}).backward()
    weight, bias = projector.conv.weight[:, :, 0, 0].detach().numpy(), projector.conv.bias.detach().numpy()
    samples = feature.numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    difference = samples @ weight.T + bias - target.numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    np.testing.assert_allclose(
        projector.conv.weight.grad[:, :, 0, 0].numpy(), 2 / difference.size * difference.T @ samples, atol=1e-14
    )
    np.testing.assert_allclose(projector.conv.bias.grad.numpy(), 2 / difference.size * difference.sum(0), atol=1e-14)


def test_a_normalised_projector_is_the_standardised_convolution():
    torch.manual_seed(0)
    projector = NormalizedProjector(3, 2)
    feature = 5 + torch.randn(4, 3, 2, 2)
    weight = projector.conv.weight[:, :, 0, 0].detach().double().numpy()
    scores = feature.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 3) @ weight.T
    expected = (scores - scores.mean(0)) / scores.std(0)
    given = projector(feature).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 2)
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_only_a_learned_projector_lets_a_gradient_reach_the_teachers_side():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    target = torch.randn(2, 4, 4, 4)
    images = torch.rand(2, 3, 4, 4)
    for teacher_projectors, has_gradient in (({}, False), ({"0": NormalizedProjector(4, 2)}, True)):
        module = StudentModule(network, nn.Identity(), taps=["0"], teacher_projectors=teacher_projectors)
        module.open_taps()
        student_map, target_map = module(images, {"0": target})[1]["0"]
        module.close_taps()
        assert student_map.requires_grad
        assert target_map.requires_grad == has_gradient
        if has_gradient:
            feature_loss({"0": (student_map, target_map)}).backward()
            assert teacher_projectors["0"].conv.weight.grad.abs().max() > 0


def test_a_tap_with_dots_in_its_name():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1)), nn.Flatten())
    channels = probe_taps(network, ["0.0"], image_size=4)["0.0"][0]
    module = StudentModule(network, nn.Identity(), taps=["0.0"], student_projectors={"0.0": FeatureProjector(channels, 7)})
    module.open_taps()
    assert module(torch.rand(2, 3, 4, 4), {"0.0": torch.zeros(2, 7, 4, 4)})[1]["0.0"][0].shape == (2, 7, 4, 4)


def test_pca_of_small_variations_around_a_large_mean():
    """Sums of plain squares would lose the variations: (1e4)^2 against (1e-3)^2 leaves no digit of them in float64."""
    generator = torch.Generator().manual_seed(0)
    features = 1e4 + 1e-3 * torch.randn(64, 3, 2, 2, dtype=torch.float64, generator=generator) * torch.tensor([4.0, 2, 1]).view(
        1, 3, 1, 1
    )
    fit = PcaFit(3)
    for part in features.split(16):
        fit.update(part)
    projector, share = fit.finish(1, tap="x")
    centred = features.movedim(1, -1).reshape(-1, 3).numpy()
    centred = centred - centred.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    direction = directions[0] * np.sign(directions[0][np.abs(directions[0]).argmax()])
    np.testing.assert_allclose(projector.conv.weight[0, :, 0, 0].numpy(), direction, atol=1e-6)
    assert share == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-6)


def test_pca_does_not_depend_on_how_the_images_are_batched():
    features = torch.rand(30, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    fits = []
    for size in (30, 7):
        fit = PcaFit(5)
        for part in features.split(size):
            fit.update(part)
        fits.append(fit.finish(2, tap="x")[0])
    torch.testing.assert_close(fits[0].conv.weight, fits[1].conv.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(fits[0].conv.bias, fits[1].conv.bias, atol=1e-6, rtol=0)


def test_pca_of_constant_features_explains_all_there_is():
    fit = PcaFit(2)
    fit.update(torch.ones(4, 2, 1, 1))
    projector, share = fit.finish(1, tap="x")
    assert share == 1.0
    assert projector(torch.ones(1, 2, 1, 1)).item() == pytest.approx(0, abs=1e-6)
