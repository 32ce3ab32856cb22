"""Tests of feature extraction: features equal the modules' outputs, hooks are removed, and unusable layers are refused."""

import pytest
import torch
from torch import nn

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor, probe_layers


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def small():
    return build_model("import:tests.support.models:student_with_everything", num_classes=4)


def test_features_equal_the_outputs_of_the_modules_and_hooks_are_removed():
    model = build_model("torchvision/resnet18", num_classes=10).eval()
    images = torch.rand(2, 3, 32, 32)
    plain = model(images)
    with FeatureExtractor(model, ["layer2", "layer4.1.conv2"]) as extractor:
        assert torch.equal(model(images), plain)
        features = extractor.take()
        assert extractor.take() == {}
    assert torch.equal(
        features["layer2"], model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(images))))))
    )
    assert features["layer4.1.conv2"].shape == (2, 512, 1, 1)
    assert hooks(model) == 0


def test_hooks_are_removed_after_an_error():
    model = small()
    with pytest.raises(ZeroDivisionError), FeatureExtractor(model, ["layer1"]):
        assert hooks(model) == 1
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_probing_does_not_change_the_model():
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert probe_layers(model, ["layer1", "layer2"], image_size=32) == {"layer1": (8, 8, 8), "layer2": (16, 2, 2)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert hooks(model) == 0


def test_probing_restores_the_mode_of_each_module():
    model = build_model("torchvision/resnet18", num_classes=4).train()
    model.layer2.eval()
    probe_layers(model, ["layer1"], image_size=32)
    assert model.layer1.training
    assert not any(module.training for module in model.layer2.modules())


def test_missing_layers_and_layers_without_feature_maps_are_refused():
    model = build_model("torchvision/resnet18", num_classes=10)
    with pytest.raises(UserError, match="layers: ResNet has no module 'layer5'; did you mean layer4.*top level: conv1, bn1"):
        FeatureExtractor(model, ["layer5"])
    with pytest.raises(UserError, match="layers: 'fc' of ResNet is not a feature map .*shape .2, 10.*use one of conv1"):
        probe_layers(model, ["fc"], image_size=32)


def test_an_output_that_is_overwritten_in_place_is_refused():
    model = build_model("torchvision/resnet18", num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), FeatureExtractor(model, ["bn1"]) as extractor:
        model(images)
        assert extractor.take()["bn1"].min() >= 0 > model.bn1(model.conv1(images)).min()  # the recorded tensor was overwritten
    with pytest.raises(
        UserError,
        match="'bn1' of ResNet has an output that a later module overwrites in place; use one of conv1, relu, maxpool, layer1",
    ):
        probe_layers(model, ["layer1", "bn1"], image_size=32)


def test_transformer_tokens_are_refused():
    model = build_model("timm/vit_tiny_patch16_224", num_classes=4, arch_args={"img_size": 32})
    with pytest.raises(UserError, match="transformer tokens, which are not supported.*use one of patch_embed.proj$"):
        probe_layers(model, ["blocks.2"], image_size=32)


class ChannelsLast(nn.Module):
    """Network with a channels-last stage [B, H, W, D] as in Swin, a module with two outputs, and an unused module."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1)
        self.stage = nn.Linear(6, 6)
        self.both = nn.LSTM(6, 6)
        self.idle = nn.Linear(2, 2)

    def forward(self, images):
        stage = self.stage(self.conv(images).permute(0, 2, 3, 1))
        return self.both(stage.flatten(1, 2))[0].mean(1)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("stage", "shape .2, 8, 8, 6., channels last, which is not supported.; use one of conv$"),
        ("both", "returns tuple.; use one of conv$"),
        ("idle", "'idle' of ChannelsLast is not executed in a forward pass; use one of conv$"),
        ("stages", "^teacher.layers: ChannelsLast has no module 'stages'; did you mean stage"),
    ],
)
def test_outputs_that_are_not_feature_maps_are_refused(layer, message):
    model = ChannelsLast()
    with pytest.raises(UserError, match=message):
        probe_layers(model, ["conv", layer], image_size=8, field="teacher.layers")
    assert hooks(model) == 0


def test_a_model_without_feature_maps_is_refused():
    with pytest.raises(UserError, match="this model has no feature maps; use another arch"):
        probe_layers(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), ["1"], image_size=2)


def test_images_too_small_for_the_model_are_refused():
    model = build_model("torchvision/alexnet", num_classes=4).train()
    with pytest.raises(UserError, match="data.image_size: AlexNet does not accept images of 32x32 .*choose another size"):
        probe_layers(model, ["features.0"], image_size=32)
    assert hooks(model) == 0
    assert model.training


def test_features_of_a_compiled_model_are_recorded():
    model = small().eval()
    with FeatureExtractor(model, ["layer1"]) as extractor:
        model.compile(backend="eager")
        model(torch.rand(2, 3, 32, 32))
        first = extractor.take()["layer1"]
        model(torch.rand(2, 3, 32, 32))
        assert not torch.equal(first, extractor.take()["layer1"])
