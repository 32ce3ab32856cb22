"""Fitting of target functions on view 0 of drawn training samples, independent of other fits; notices to the user."""

import pytest
import torch

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
    return load_data(DataConfig(source="import:tests.support.models:images", augment="crop_flip", val_fraction=0.2))


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
