"""Tests of conv-bn fusion: a fused network is the same function, and unsafe fusions are refused."""

import pytest
import torch
from torch import nn

from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.models.inference import fuse_conv_bn

STAGES = ["layer1", "layer2", "layer3", "layer4"]


class Block(nn.Module):
    """Convolution, norm, ReLU and classifier, with BatchNorm statistics as after a training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        _set_statistics(self.norm)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


class Twice(Block):
    """Block whose convolution is also used without the norm."""

    def forward(self, images):
        maps = self.conv(images)
        return self.head((self.norm(maps) + maps).mean((2, 3)))


class Shared(Block):
    """Block whose norm is called twice, for two convolutions."""

    def __init__(self):
        super().__init__()
        self.other = nn.Conv2d(3, 6, 3)

    def forward(self, images):
        return self.head((self.norm(self.conv(images)) + self.norm(self.other(images))).mean((2, 3)))


class Branching(Block):
    """Block that cannot be traced: its control flow depends on the images."""

    def forward(self, images):
        return super().forward(images if images.sum() > 0 else -images)


class ReadsWeight(Block):
    """Block that reads a weight of its norm in its own forward."""

    def forward(self, images):
        return super().forward(images) * self.norm.weight.mean()


class BatchStatistics(Block):
    """Block whose norm always uses the statistics of the batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)


def _set_statistics(module):
    """Set the parameters and running statistics of all BatchNorms to random values, as after a training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                tensor.normal_(1.0, 0.3)
            norm.running_var.uniform_(0.5, 2.0)


def _norms(module):
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


@pytest.mark.parametrize("arch", ["resnet50", "resnet18", "mobilenet_v2"])
def test_a_fused_network_is_the_same_function_in_float64(arch):
    model = build_model(f"torchvision/{arch}", num_classes=7, seed=1)
    _set_statistics(model)
    model.double().eval()
    fused = fuse_conv_bn(model, layers=[], image_size=32)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert _norms(model) > 0 and _norms(fused) == 0
    assert torch.allclose(fused(images), model(images), rtol=1e-11, atol=1e-11)


def test_layers_keep_their_names_and_values():
    model = build_model("torchvision/resnet18", num_classes=7).double().eval()
    _set_statistics(model)
    fused = fuse_conv_bn(model, layers=STAGES, image_size=32)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = []
    for network in (model, fused):
        with FeatureExtractor(network, STAGES) as extractor, torch.no_grad():
            network(images)
            features.append(extractor.take())
    for layer in STAGES:
        assert torch.allclose(features[0][layer], features[1][layer], rtol=1e-10)


def test_the_model_is_not_changed():
    model = Block().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse_conv_bn(model, layers=[], image_size=8)
    assert model.training and _norms(model) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not fused.training and not any(weight.requires_grad for weight in fused.parameters())


def test_a_norm_that_the_caller_keeps_in_evaluation_mode_stays_in_it():
    model = Block().train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    fuse_conv_bn(model, layers=[], image_size=8)
    assert model.training and not frozen.training


@pytest.mark.parametrize("layer", ["conv", "norm", "head"])
def test_only_a_layer_before_the_norm_prevents_fusion(layer):
    assert (fuse_conv_bn(Block(), layers=[layer], image_size=8) is None) == (layer == "conv")


@pytest.mark.parametrize("kind", [Twice, Shared, Branching, ReadsWeight, BatchStatistics])
def test_unsafe_fusions_are_refused(kind):
    assert fuse_conv_bn(kind(), layers=[], image_size=8) is None


def test_a_network_without_batch_norm_is_not_fused():
    assert fuse_conv_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), layers=[], image_size=8) is None
