"""Tests of `layers: auto`: the chosen layers of each kind of network, and their pairs."""

from collections import OrderedDict

import pytest
import timm  # noqa: F401  (seconds that would count for the first test)
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vgg import make_layers

from kd_accel.errors import UserError
from kd_accel.models.auto_layers import auto_layers, pair_layers
from kd_accel.models.factory import _replace_stem, build_model

STAGES = ["layer1", "layer2", "layer3", "layer4"]
CHOSEN = {
    "torchvision/resnet18": STAGES,
    "torchvision/resnet50": STAGES,
    "timm/resnet18": STAGES,
    "torchvision/densenet121": [f"features.denseblock{number}" for number in (1, 2, 3, 4)],
    "torchvision/shufflenet_v2_x0_5": ["stage2", "stage3", "stage4"],
    "torchvision/mobilenet_v2": ["features.1", "features.3", "features.6", "features.13", "features.17"],
    "import:tests.support.models:student": ["layer1", "layer2"],
}


@pytest.mark.parametrize("arch", CHOSEN)
def test_the_last_block_of_each_resolution_is_chosen(arch):
    assert auto_layers(build_model(arch, num_classes=4), image_size=32) == CHOSEN[arch]


def test_a_network_without_blocks_is_divided_at_its_pooling():
    """The activations, because they overwrite the convolutions in place; the last pooling has no convolution behind it."""
    features = make_layers([4, 4, "M", 8, "M", 8, 8, "M"])
    model = nn.Sequential(
        OrderedDict(features=features, avgpool=nn.AdaptiveAvgPool2d(7), flat=nn.Flatten(), fc=nn.Linear(392, 2))
    )
    assert auto_layers(model, image_size=32) == ["features.3", "features.6", "features.11"]


@pytest.mark.parametrize("stem", ["imagenet", "no_pool", "cifar"])
@pytest.mark.parametrize("image_size", [8, 32, 72])
def test_the_layers_of_resnets_are_paired_by_depth_at_any_size_of_images(stem, image_size):
    student, teacher = resnet(layers=[1, 2, 1, 1]), resnet(layers=[2, 1, 1, 2])
    _replace_stem(student, stem, "model.stem", "resnet")
    assert pair_layers(student, teacher, image_size=image_size) == {layer: layer for layer in STAGES}


def resnet(layers):
    """Build a small ResNet with a number of blocks for each resolution."""
    return ResNet(BasicBlock, layers, num_classes=4)


def transformer(depth):
    """Build a small ViT for images of 32 pixels."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": depth}
    return build_model("timm/vit_tiny_patch16_224", num_classes=4, arch_args=arguments)


def test_a_network_of_one_resolution_is_divided_into_equal_depths():
    vit, student = transformer(12), resnet([1, 1, 1, 1])
    parts = ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    assert auto_layers(vit, image_size=32) == parts
    assert pair_layers(student, vit, image_size=32) == dict(zip(STAGES, parts, strict=True))
    assert pair_layers(vit, student, image_size=32) == dict(zip(parts, STAGES, strict=True))
    small = build_model("import:tests.support.models:student", num_classes=4)
    assert pair_layers(small, vit, image_size=32) == {"layer1": "blocks.5", "layer2": "blocks.11"}
    pairs = {"blocks.1": "blocks.2", "blocks.2": "blocks.5", "blocks.4": "blocks.8", "blocks.5": "blocks.11"}
    assert pair_layers(transformer(6), vit, image_size=32) == pairs
    pairs = {"blocks.0": "blocks.3", "blocks.1": "blocks.7", "blocks.2": "blocks.11"}
    assert pair_layers(transformer(3), vit, image_size=32) == pairs


def test_layers_are_paired_from_the_deepest():
    teacher = resnet([1, 1, 1, 1])
    efficientnet = build_model("timm/efficientnet_b0", num_classes=4)
    pairs = {"blocks.1": "layer1", "blocks.2": "layer2", "blocks.4": "layer3", "blocks.6": "layer4"}
    assert pair_layers(efficientnet, teacher, image_size=32) == pairs
    assert pair_layers(teacher, efficientnet, image_size=32) == {other: layer for layer, other in pairs.items()}


class Wrapper(nn.Module):
    """Network that uses another without its classifier."""

    def __init__(self):
        super().__init__()
        network = build_model("torchvision/resnet18", num_classes=4)
        self.backbone = nn.Sequential(*list(network.children())[:-2])
        self.fc = nn.Linear(512, 4)

    def forward(self, images):
        return self.fc(self.backbone(images).mean((2, 3)))


def test_the_blocks_of_a_network_inside_another_are_found():
    assert auto_layers(Wrapper(), image_size=32) == [f"backbone.{number}" for number in (4, 5, 6, 7)]


def test_choosing_does_not_change_the_network():
    model = build_model("torchvision/resnet18", num_classes=4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    auto_layers(model, image_size=32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_a_network_without_feature_maps_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(UserError, match=r"distill.x.layers: auto finds no layer of Sequential with a feature map"):
        auto_layers(model, image_size=2, field="distill.x.layers")


def test_a_size_that_the_network_does_not_accept_is_refused():
    with pytest.raises(UserError, match=r"data.image_size: VisionTransformer .*set arch_args: .img_size: 32., or choose"):
        auto_layers(build_model("timm/vit_tiny_patch16_224", num_classes=4), image_size=32)
