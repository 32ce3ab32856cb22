"""Target functions: the PCA against numpy, also for a large mean, fitted tensors, and descriptions."""

import numpy as np
import pytest
import torch

from kd_accel.cache.shard import decode, encode
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


@pytest.mark.parametrize("value", [1.0, 7.3])
def test_pca_of_constant_features_has_no_direction_and_explains_all_of_the_variance(value):
    pca = PCA(1)
    pca.fit(torch.full((21, 2, 1, 1), value).split(9))
    assert pca.explained == 1.0 and pca.directions == 0
    assert pca(torch.rand(1, 2, 1, 1)).item() == 0


FEW = {
    "30 images with maps of one pixel, 48 channels of 64": (30, 64, 48, 64),
    "200 pixels with 20 of 64 channels dead": (200, 64, 48, 44),
    "two pixels": (2, 64, 48, 64),
    "as many directions as channels": (49, 64, 48, 64),
}


@pytest.mark.parametrize(("pixels", "teacher_channels", "channels", "alive"), FEW.values(), ids=FEW)
def test_pca_of_pixels_with_few_directions_is_numpys_and_zero_beyond_them(pixels, teacher_channels, channels, alive):
    generator = np.random.default_rng(0)
    samples = np.maximum(generator.standard_normal((pixels, teacher_channels)) * np.linspace(9, 1, teacher_channels) + 3, 0)
    samples[:, alive:] = 0
    features = torch.from_numpy(samples.astype(np.float32))[:, :, None, None]
    pca = PCA(channels)
    pca.fit(features.split(16))
    mean, components, singular = numpy_pca(features.double().numpy()[:, :, 0, 0], min(channels, pixels - 1, alive))
    directions = len(components)
    assert pca.directions == directions == min(channels, pixels - 1, alive)
    np.testing.assert_allclose(pca.projector.conv.weight[:directions, :, 0, 0].numpy(), components, atol=1e-6)
    scores = pca(features).detach()[:, :, 0, 0].numpy()
    expected = (features.double().numpy()[:, :, 0, 0] - mean) @ components.T
    np.testing.assert_allclose(scores[:, :directions], expected, atol=1e-4)
    assert not scores[:, directions:].any()
    unseen = pca(100 * torch.randn(8, teacher_channels, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert unseen.shape == (8, channels, 2, 2) and not unseen[:, directions:].any() and unseen[:, :directions].all()
    assert pca.explained == pytest.approx((singular[:directions] ** 2).sum() / (singular**2).sum())


def test_a_pca_with_few_directions_is_deterministic_and_restored_from_its_tensors():
    features = torch.rand(20, 64, 1, 1, generator=torch.Generator().manual_seed(0))
    first, second, loaded = PCA(32), PCA(32), PCA(32)
    assert first.directions == 0
    first.fit(features.split(8))
    second.fit(features.split(8))
    loaded.load(first.tensors())
    assert torch.equal(first.projector.conv.weight, second.projector.conv.weight)
    assert torch.equal(first.projector.conv.bias, second.projector.conv.bias)
    assert loaded.directions == first.directions == 19
    assert torch.equal(loaded(features), first(features))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_channels_without_a_direction_stay_zero_in_each_storage_type(dtype):
    pca = PCA(32)
    pca.fit([torch.rand(20, 64, 1, 1)])
    stored, scale = encode(pca(torch.rand(9, 64, 1, 1)), dtype, name="layer4")
    decoded = decode(stored, scale)
    assert not decoded[:, 19:].any() and decoded[:, :19].any(0).all()


@pytest.mark.parametrize("features", [[torch.rand(1, 6, 1, 1)], []])
def test_pca_without_two_pixels_is_refused(features):
    count = sum(len(feature) for feature in features)
    with pytest.raises(UserError, match=f"a PCA of layer4 needs two pixels or more, the images have {count}; raise"):
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
