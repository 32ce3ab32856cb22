"""Tests of feature extraction: features equal the modules' outputs, hooks are removed, and unusable layers are refused."""

import pytest
import timm  # noqa: F401  (seconds that would count for the first test)
import torch
from torch import nn

from kd_accel.errors import UserError
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor, feature_maps, probe_layers, probe_logits


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


def vit(**arguments):
    """Build a transformer with 8x8 tokens of an image of 32 pixels."""
    arguments = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 24, **arguments}
    return build_model("timm/vit_tiny_patch16_224", num_classes=4, arch_args=arguments)


def test_transformer_tokens_become_maps_without_the_class_token():
    model, images = vit().eval(), torch.rand(2, 3, 32, 32)
    assert probe_layers(model, ["patch_embed", "blocks.1"], image_size=32) == {
        "patch_embed": (24, 8, 8),
        "blocks.1": (24, 8, 8),
    }
    with torch.no_grad(), FeatureExtractor(model, ["patch_embed", "blocks.1"]) as extractor:
        model(images)
        features = extractor.take()
        tokens = model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(images))))
        assert torch.equal(features["blocks.1"].flatten(2).transpose(1, 2), tokens[:, 1:])
        assert torch.equal(features["patch_embed"], model.patch_embed.proj(images))


@pytest.mark.parametrize(
    ("arch", "arguments", "layer", "message"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "patch_drop_rate": 0.5}, "blocks.0", "at random .*leave out patch_drop_rate"),
        (
            "hiera_tiny_224",
            {"img_size": [64, 64]},
            "blocks.1",
            "'blocks.1' of Hiera has tokens .*not in the order of the image",
        ),
    ],
)
def test_tokens_that_are_not_the_pixels_of_a_map_are_refused(arch, arguments, layer, message):
    model = build_model(f"timm/{arch}", num_classes=4, arch_args=arguments)
    probe_layers(model, ["patch_embed.proj"], image_size=64)
    with pytest.raises(UserError, match=message):
        probe_layers(model, [layer], image_size=64)


class ChannelsLast(nn.Module):
    """Network with a channels-last stage [B, H, W, D] as in Swin, a module with two outputs, and an unused module."""

    def __init__(self, size=None):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(3, 6, 1)
        self.stage = nn.Linear(6, 6)
        self.both = nn.LSTM(6, 6)
        self.idle = nn.Linear(2, 2)

    def forward(self, images):
        assert self.size in (None, images.shape[3])
        stage = self.stage(self.conv(images).permute(0, 2, 3, 1))
        return self.both(stage.flatten(1, 2))[0].mean(1)


def test_channels_last_outputs_are_turned():
    model, images = ChannelsLast(), torch.rand(2, 3, 8, 8)
    assert probe_layers(model, ["conv", "stage"], image_size=8) == {"conv": (6, 8, 8), "stage": (6, 8, 8)}
    with torch.no_grad(), FeatureExtractor(model, ["conv", "stage"]) as extractor:
        model(images)
        features = extractor.take()
        expected = torch.einsum("bchw,dc->bdhw", features["conv"], model.stage.weight) + model.stage.bias[:, None, None]
        torch.testing.assert_close(features["stage"], expected)


def test_channels_that_cannot_be_told_from_columns_are_refused_if_they_are_last():
    """At 6 pixels both layers output [2, 6, 6, 6]; images of twice the width tell them apart."""
    model = ChannelsLast()
    assert probe_layers(model, ["conv"], image_size=6) == {"conv": (6, 6, 6)}
    with pytest.raises(
        UserError, match=r"'stage' .* as many channels as columns .6., which cannot be told apart; use one of conv$"
    ):
        probe_layers(model, ["stage"], image_size=6)
    assert set(feature_maps(model, image_size=6)) == {"conv"}


def test_a_model_for_one_size_has_channels_first_unless_timm_says_otherwise():
    model = ChannelsLast(size=6)
    assert list(probe_layers(model, ["conv", "stage"], image_size=6)) == ["conv", "stage"]
    model.output_fmt = "NHWC"
    with pytest.raises(UserError, match="'stage' .* cannot be told apart"):
        probe_layers(model, ["stage"], image_size=6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("both", "'both' of ChannelsLast is not a feature map .* .it returns tuple.; use one of conv, stage$"),
        ("idle", "'idle' of ChannelsLast is not executed in a forward pass; use one of conv, stage$"),
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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: build_model("timm/resnet18", num_classes=4, arch_args={"in_chans": 1}),
            "^arch_args: ResNet takes images of 1 ch",
        ),
        (lambda: vit(img_size=64), r"^data.image_size: VisionTransformer .*; set arch_args: \{img_size: 32\}, or choose"),
        (lambda: ChannelsLast(size=6), "^data.image_size: ChannelsLast does .*; choose another size or arch$"),
        (lambda: nn.Conv2d(3, 4, 1), r"returns a tensor of shape .2, 4, 32, 32.*\{aux_logits: false\}"),
    ],
)
def test_the_remedy_names_the_argument_of_the_model(model, message):
    with pytest.raises(UserError, match=message):
        probe_logits(model(), num_classes=4, image_size=32)


def test_an_output_that_is_no_map_is_refused_when_it_is_recorded():
    model = build_model("torchvision/resnet18", num_classes=4)
    with pytest.raises(ValueError, match="layers: 'fc' is not a feature map .*shape .2, 4"), FeatureExtractor(model, ["fc"]):
        model(torch.rand(2, 3, 32, 32))
    assert hooks(model) == 0


@pytest.mark.slow
def test_features_of_a_compiled_transformer_are_recorded():
    model, images = vit().eval(), torch.rand(2, 3, 32, 32)
    with torch.no_grad(), FeatureExtractor(model, ["blocks.1"]) as extractor:
        model(images)
        expected = extractor.take()["blocks.1"]
        model.compile(backend="eager", fullgraph=True)
        model(images)
        torch.testing.assert_close(extractor.take()["blocks.1"], expected)


def test_features_of_a_compiled_model_are_recorded():
    model = small().eval()
    with FeatureExtractor(model, ["layer1"]) as extractor:
        model.compile(backend="eager")
        model(torch.rand(2, 3, 32, 32))
        first = extractor.take()["layer1"]
        model(torch.rand(2, 3, 32, 32))
        assert not torch.equal(first, extractor.take()["layer1"])
