"""Target functions: the PCA against numpy, also for a large mean, fitted tensors, and descriptions."""

import numpy as np
import pytest
import torch

from kd_accel.errors import UserError
from kd_accel.losses.targets import PCA, Identity, build_target


def numpy_pca(samples, channels):
    """Compute mean, leading components and singular values of samples [n, D]; largest entries of components are positive."""
    mean = samples.mean(0)
    _, singular, components = np.linalg.svd(samples - mean, full_matrices=False)
    components = components[:channels]
    return mean, components * np.sign(components[np.arange(channels), np.abs(components).argmax(1)])[:, None], singular


def test_pca_matches_numpy_svd():
    generator = np.random.default_rng(0)
    features = (generator.standard_normal((40, 6, 3, 3)) * np.array([5, 4, 3, 2, 1, 0.5])[:, None, None] + 7).astype(np.float32)
    pca = PCA(3)
    pca.fit(torch.from_numpy(features[start : start + 16]) for start in range(0, 40, 16))
    samples = features.transpose(0, 2, 3, 1).reshape(-1, 6).astype(np.float64)
    mean, components, singular = numpy_pca(samples, 3)
    scores = pca(torch.from_numpy(features)).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(pca.projector.conv.weight[:, :, 0, 0].numpy(), components, atol=1e-6)
    np.testing.assert_allclose(scores, (samples - mean) @ components.T, atol=1e-4)
    assert pca.explained == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())
    assert not any(parameter.requires_grad for parameter in pca.parameters())
    assert pca.output_shape((6, 3, 3)) == (3, 3, 3)


def test_pca_of_small_variations_around_a_large_mean():
    """Plain sums of squares would lose the variations: float64 has too few digits for (1e4)^2 + (1e-3)^2."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([4.0, 2, 1]).view(1, 3, 1, 1)
    features = 1e4 + 1e-3 * torch.randn(64, 3, 2, 2, dtype=torch.float64, generator=generator) * scale
    pca = PCA(1)
    pca.fit(features.split(16))
    _, components, singular = numpy_pca(features.movedim(1, -1).reshape(-1, 3).numpy(), 1)
    np.testing.assert_allclose(pca.projector.conv.weight[:, :, 0, 0].numpy(), components, atol=1e-6)
    assert pca.explained == pytest.approx(singular[0] ** 2 / (singular**2).sum(), rel=1e-6)


def test_pca_does_not_depend_on_batching():
    features = torch.rand(30, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    single, batched = PCA(2), PCA(2)
    single.fit([features])
    batched.fit(features.split(7))
    torch.testing.assert_close(single.projector.conv.weight, batched.projector.conv.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(single.projector.conv.bias, batched.projector.conv.bias, atol=1e-6, rtol=0)


def test_pca_of_constant_features_explains_all_of_the_variance():
    pca = PCA(1)
    pca.fit([torch.ones(4, 2, 1, 1)])
    assert pca.explained == 1.0
    assert pca(torch.ones(1, 2, 1, 1)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("features", [[torch.rand(3, 6, 1, 1)], []])
def test_pca_with_too_few_pixels_is_refused(features):
    count = sum(len(feature) for feature in features)
    with pytest.raises(
        UserError, match=f"{count} pixels of layer4 are too few to fit a PCA with 3 components; raise args.pca_images"
    ):
        PCA(3).fit(features, layer="layer4")


def test_fitted_tensors_round_trip():
    features = torch.randn(20, 5, 2, 2)
    pca, loaded = PCA(2, images=20), PCA(2, images=20)
    assert not pca.is_fitted and pca.tensors() == {}
    with pytest.raises(RuntimeError, match="the PCA is not fitted; call fit"):
        pca(features)
    pca.fit([features])
    assert pca.is_fitted and not loaded.is_fitted
    loaded.load({name: tensor.clone() for name, tensor in pca.tensors().items()})
    assert torch.equal(loaded(features), pca(features))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"conv.weight": torch.zeros(2, 5, 1, 1)},
        {"conv.weight": torch.zeros(3, 5, 1, 1), "conv.bias": torch.zeros(3)},
        {"conv.weight": torch.zeros(2, 5, 3, 3), "conv.bias": torch.zeros(2)},
        {"conv.weight": torch.zeros(2, 5, 1, 1), "conv.bias": torch.zeros(1)},
        {"conv.weight": torch.zeros(2, 5), "conv.bias": torch.zeros(2)},
    ],
)
def test_tensors_of_another_function_are_refused(tensors):
    names, shapes = (
        "a PCA needs the tensors conv.weight and conv.bias, got",
        "a PCA with 2 components needs conv.weight of shape",
    )
    with pytest.raises(ValueError, match=shapes if len(tensors) == 2 else names):
        PCA(2).load(tensors)
    if tensors:
        with pytest.raises(ValueError, match="unexpected tensors"):
            Identity().load(tensors)


def test_function_is_rebuilt_from_its_description():
    for target in (Identity(), PCA(7, images=9)):
        rebuilt = build_target(target.description())
        assert type(rebuilt) is type(target)
        assert rebuilt.description() == target.description()
    assert Identity().is_fitted and Identity().output_shape((3, 2, 2)) == (3, 2, 2)


@pytest.mark.parametrize(
    "description", [{}, {"name": "ica"}, {"name": "pca", "channels": 3}, {"name": "identity", "channels": 3}]
)
def test_unknown_description_is_refused(description):
    with pytest.raises(ValueError, match="not a known target function"):
        build_target(description)


@pytest.mark.parametrize("settings", [{"channels": 0}, {"channels": 1, "images": 0}])
def test_pca_without_channels_or_images_is_refused(settings):
    with pytest.raises(ValueError, match="at least 1"):
        PCA(**settings)
