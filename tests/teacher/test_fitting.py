"""Fitting of target functions on view 0 of drawn training samples, independent of other fits; notices to the user."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.losses.targets import PCA, Identity
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.fitting import fit_notices, fit_targets

NORMALIZE = Normalize([0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(source="import:tests.support.models:images", transform="crop_flip", val_fraction=0.2))


@pytest.fixture(scope="module")
def network():
    return build_model("import:tests.support.models:teacher", num_classes=4).eval()


def recorded(network, data, layer):
    images = data.view_batch(data.splits.train, 0).images
    with FeatureExtractor(network, [layer]) as extractor, torch.no_grad():
        network(NORMALIZE(images))
        return extractor.take()[layer]


def test_a_fit_on_all_samples_equals_a_fit_on_their_features(network, data):
    fitted, expected = PCA(4, images=10_000), PCA(4)
    fit_targets({"layer2": fitted, "layer1": Identity()}, data, network.train(), NORMALIZE)
    network.eval()
    expected.fit([recorded(network, data, "layer2")])
    torch.testing.assert_close(fitted.projector.conv.weight, expected.projector.conv.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted.projector.conv.bias, expected.projector.conv.bias, atol=1e-5, rtol=0)
    assert fitted.explained == pytest.approx(expected.explained)


def test_a_fit_on_one_sample_more_than_its_batch_uses_each_sample(network, data):
    more = replace(data, splits=replace(data.splits, train=np.arange(129)))
    fitted, expected = PCA(4, images=129), PCA(4)
    fit_targets({"layer2": fitted}, more, network, NORMALIZE)
    expected.fit([recorded(network, more, "layer2")])
    torch.testing.assert_close(fitted.projector.conv.bias, expected.projector.conv.bias, atol=1e-5, rtol=0)
    assert fitted.explained == pytest.approx(expected.explained, rel=1e-6)


def test_a_fit_depends_only_on_its_own_layer_and_images(network, data):
    alone = PCA(4, images=40)
    fit_targets({"layer2": alone}, data, network, NORMALIZE)
    together = {"layer1": PCA(3, images=24), "layer2": PCA(4, images=40)}
    fit_targets(together, data, network, NORMALIZE)
    assert torch.equal(together["layer2"].projector.conv.weight, alone.projector.conv.weight)
    other = PCA(4, images=24)
    fit_targets({"layer2": other}, data, network, NORMALIZE)
    assert not torch.equal(other.projector.conv.weight, alone.projector.conv.weight)


def test_a_fitted_function_is_not_fitted_again(network, data):
    pca = PCA(4, images=40)
    pca.fit([torch.randn(50, 32, 1, 1)])
    before = pca.projector.conv.weight.clone()
    fit_targets({"layer2": pca}, data, network, NORMALIZE)
    assert torch.equal(pca.projector.conv.weight, before)


def test_notices():
    pca = PCA(2, images=300)
    pca.fit([torch.randn(50, 5, 1, 1)])
    kept = f"PCA of layer4 explains {pca.explained:.1%} of the variance"
    assert fit_notices({"layer4": pca, "layer1": Identity()}, num_samples=300) == [kept]
    first, second = fit_notices({"layer4": pca}, num_samples=128)
    assert first == kept
    assert second == (
        "distill.features: pca_images 300 is more than the 128 training samples; the PCA is fitted on all training samples"
    )


@pytest.mark.parametrize(
    ("num_samples", "remedy"),
    [(20, "use more training samples, or direction student_to_teacher"), (21, "raise args.pca_images, or use direction")],
)
def test_notice_of_channels_without_a_direction(num_samples, remedy):
    few, enough = PCA(32, images=20), PCA(19, images=20)
    for pca in (few, enough):
        pca.fit([torch.randn(20, 64, 1, 1)])
    notices = fit_notices({"layer4": few, "layer3": enough}, num_samples=num_samples)
    assert len(notices) == 3
    assert notices[2].startswith(
        "distill.features: layer4 of the 20 images of the fit varies in 19 directions, fewer than the 32 channels of its "
        f"target; 13 channels are zero ({remedy}"
    )


def test_a_fit_on_a_few_samples_with_maps_of_one_pixel(network, data):
    """The 12 samples leave 11 of 16 channels, which another fit repeats bit for bit."""
    few = replace(data, splits=replace(data.splits, train=data.splits.train[:12]))
    fitted, again = PCA(16), PCA(16)
    for target in (fitted, again):
        fit_targets({"avgpool": target}, few, PooledMaps(network), NORMALIZE)
    assert fitted.directions == 11
    assert torch.equal(fitted.projector.conv.weight, again.projector.conv.weight)
    maps = recorded(PooledMaps(network), few, "avgpool")
    singular = np.linalg.svd((maps - maps.mean(0)).flatten(1).double().numpy(), compute_uv=False)
    scores = fitted(maps)
    np.testing.assert_allclose(np.sort((scores**2).sum((0, 2, 3)).numpy())[:4:-1], singular[:11] ** 2, rtol=1e-3)
    assert not scores[:, 11:].any()


class PooledMaps(nn.Module):
    """Network with a layer whose maps have one pixel."""

    def __init__(self, network):
        super().__init__()
        self.network, self.avgpool = network, nn.AdaptiveAvgPool2d(1)

    def forward(self, images):
        return self.avgpool(self.network.layer2(self.network.layer1(images)))
