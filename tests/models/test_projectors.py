"""Projectors: three directions, gradients by hand in float64, and the PCA against numpy and where it is numerically hard."""

import numpy as np
import pytest
import torch
from torch import nn

from kd_accel.bench.model_stats import count_macs
from kd_accel.errors import UserError
from kd_accel.losses.features import feature_loss
from kd_accel.models.feature_extractor import probe_layers
from kd_accel.models.projectors import FeatureProjector, PcaFit, build_projectors
from kd_accel.models.student import StudentModule

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
SHAPES = {"a.b": (4, 8, 8)}, {"a.b": (16, 8, 8)}


@pytest.mark.parametrize(
    ("direction", "student", "pca"),
    [("student_to_teacher", [(4, 16)], {}), ("both", [(4, 4)], {"a.b": 4}), ("teacher_to_student", [], {"a.b": 4})],
)
def test_the_three_directions(direction, student, pca):
    projectors = build_projectors(*SHAPES, direction=direction)
    widths = [(projector.conv.in_channels, projector.conv.out_channels) for projector in projectors.student.values()]
    assert (widths, projectors.pca_channels) == (student, pca)
    module = StudentModule(nn.Sequential(), nn.Identity(), student_projectors=projectors.student)
    names = [f"student_projectors.a/b.conv.{name}" for name in ("weight", "bias")]
    assert list(module.state_dict()) == (names if student else [])


def test_a_pca_cannot_add_channels():
    with pytest.raises(UserError, match="a PCA only removes channels; use student_to_teacher"):
        build_projectors(*reversed(SHAPES), direction="both")


def test_multiply_adds_of_the_learned_projectors():
    """What student_to_teacher and both add to ResNet-18's 37 M at 32x32: about 4.2 M and 1 M."""
    sizes = (8, 4, 2, 1)
    student = {layer: (d, s, s) for layer, d, s in zip(LAYERS, (64, 128, 256, 512), sizes, strict=True)}
    teacher = {layer: (d, s, s) for layer, d, s in zip(LAYERS, (256, 512, 1024, 2048), sizes, strict=True)}
    for direction, expected in (("student_to_teacher", 4_194_304), ("both", 1_048_576)):
        projectors = build_projectors(student, teacher, direction=direction).student
        assert sum(count_macs(projectors[layer], torch.zeros(1, *student[layer])) for layer in LAYERS) == expected


def test_learned_projectors_start_from_seed_and_layer_alone():
    def weight(seed):
        torch.manual_seed(seed * 77)
        return build_projectors(*SHAPES, direction="both", seed=seed).student["a.b"].conv.weight

    assert torch.equal(weight(0), weight(0))
    assert not torch.equal(weight(0), weight(1))
    assert isinstance(build_projectors(*SHAPES, direction="both").student["a.b"], FeatureProjector)


def test_a_learned_projectors_gradient_through_the_feature_loss():
    torch.manual_seed(0)
    projector = FeatureProjector(3, 5).double()
    feature, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    feature_loss({"layer": (projector(feature), target)}).backward()
    weight, bias = projector.conv.weight[:, :, 0, 0].detach().numpy(), projector.conv.bias.detach().numpy()
    samples = feature.numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    difference = samples @ weight.T + bias - target.numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    np.testing.assert_allclose(
        projector.conv.weight.grad[:, :, 0, 0].numpy(), 2 / difference.size * difference.T @ samples, atol=1e-14
    )
    np.testing.assert_allclose(projector.conv.bias.grad.numpy(), 2 / difference.size * difference.sum(0), atol=1e-14)


FORMS = {
    "channels innermost": (4, 2, 5, torch.channels_last),
    "no fewer pixels than channels": (20, 3, 16, torch.contiguous_format),
    "fewer pixels than channels": (20, 3, 17, torch.contiguous_format),
    "one pixel": (1, 3, 5, torch.contiguous_format),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_projector_is_the_convolution_in_every_form_that_it_takes(form, dtype):
    """pixels x in_channels -> out_channels. Answer, layout and gradients, in float64 and under autocast."""
    pixels, in_channels, out_channels, memory_format = FORMS[form]
    torch.manual_seed(0)
    height = 4 if pixels % 4 == 0 else 1
    shape = (3, in_channels, height, pixels // height)
    projector = FeatureProjector(in_channels, out_channels).to(torch.float64 if dtype == torch.float64 else torch.float32)
    feature = torch.randn(shape, dtype=projector.conv.weight.dtype).contiguous(memory_format=memory_format).requires_grad_()
    found = []
    for answer in (projector, projector.conv):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            given = answer(feature)
        assert given.dtype == dtype and given.is_contiguous(memory_format=memory_format)
        gradients = torch.autograd.grad(given.square().sum(), [feature, *projector.parameters()])
        found.append([given.detach().to(torch.float64), *(gradient.to(torch.float64) for gradient in gradients)])
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


def test_a_layer_with_dots_in_its_name():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1)), nn.Flatten())
    channels = probe_layers(network, ["0.0"], image_size=4)["0.0"][0]
    module = StudentModule(network, nn.Identity(), layers=["0.0"], student_projectors={"0.0": FeatureProjector(channels, 7)})
    module.start_recording()
    assert module(torch.rand(2, 3, 4, 4), {"0.0": torch.zeros(2, 7, 4, 4)})[1]["0.0"][0].shape == (2, 7, 4, 4)


def test_pca_against_numpys_svd():
    generator = np.random.default_rng(0)
    features = (generator.standard_normal((40, 6, 3, 3)) * np.array([5, 4, 3, 2, 1, 0.5])[:, None, None] + 7).astype(np.float32)
    fit = PcaFit(6)
    for start in range(0, 40, 16):
        fit.update(torch.from_numpy(features[start : start + 16]))
    projector, share = fit.finish(3, layer="x")
    samples = features.transpose(0, 2, 3, 1).reshape(-1, 6).astype(np.float64)
    centred = samples - samples.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:3] * np.sign(directions[:3][np.arange(3), np.abs(directions[:3]).argmax(1)])[:, None]
    scores = projector(torch.from_numpy(features)).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(projector.conv.weight[:, :, 0, 0].numpy(), directions, atol=1e-6)
    np.testing.assert_allclose(scores, centred @ directions.T, atol=1e-4)
    assert share == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())
    assert not any(parameter.requires_grad for parameter in projector.parameters())


def test_pca_of_small_variations_around_a_large_mean():
    """Sums of plain squares would lose the variations: (1e4)^2 against (1e-3)^2 leaves no digit of them in float64."""
    generator = torch.Generator().manual_seed(0)
    features = 1e4 + 1e-3 * torch.randn(64, 3, 2, 2, dtype=torch.float64, generator=generator) * torch.tensor([4.0, 2, 1]).view(
        1, 3, 1, 1
    )
    fit = PcaFit(3)
    for part in features.split(16):
        fit.update(part)
    projector, share = fit.finish(1, layer="x")
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
        fits.append(fit.finish(2, layer="x")[0])
    torch.testing.assert_close(fits[0].conv.weight, fits[1].conv.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(fits[0].conv.bias, fits[1].conv.bias, atol=1e-6, rtol=0)


def test_pca_of_constant_features_explains_all_there_is():
    fit = PcaFit(2)
    fit.update(torch.ones(4, 2, 1, 1))
    projector, share = fit.finish(1, layer="x")
    assert share == 1.0
    assert projector(torch.ones(1, 2, 1, 1)).item() == pytest.approx(0, abs=1e-6)


def test_too_few_samples_for_the_rank():
    fit = PcaFit(6)
    fit.update(torch.rand(3, 6, 1, 1))
    with pytest.raises(UserError, match="pca_images: 3 samples at layer4, but 3 directions need more"):
        fit.finish(3, layer="layer4")
