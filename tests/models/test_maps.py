"""Tests of feature maps from outputs: maps, channels-last maps and tokens, against a loop over their pixels."""

import pytest
import timm  # noqa: F401  (seconds that would count for the first test)
import torch
from torch import nn

from kd_accel.models.factory import build_model
from kd_accel.models.maps import as_map, prefix_tokens

TORCHVISION = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}


def pixels(height, width, read):
    """Return the map of an image, with the channels `read(row, column)` of each pixel."""
    return torch.stack([torch.stack([read(row, column) for column in range(width)], 1) for row in range(height)], 1)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_become_the_rows_of_a_map_without_their_prefix(prefix):
    tokens = torch.randn(2, prefix + 16, 3, dtype=torch.float64)
    feature = as_map(tokens, prefix)
    assert feature.shape == (2, 3, 4, 4)
    for image in range(2):
        expected = pixels(4, 4, lambda row, column, image=image: tokens[image, prefix + 4 * row + column])
        assert torch.equal(feature[image], expected)


def test_channels_last_outputs_are_turned():
    output = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    feature = as_map(output, 0)
    assert torch.equal(feature[1], pixels(4, 4, lambda row, column: output[1, row, column]))
    assert as_map(torch.randn(2, 1, 1, 7), 0).shape == (2, 7, 1, 1)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 4, 4, 4), (2, 7, 1, 1), (2, 3, 4, 6)])
def test_maps_stay_as_they_are(shape):
    output = torch.randn(shape)
    assert as_map(output, 1) is output


def test_maps_are_views_through_which_gradients_flow():
    tokens = torch.randn(2, 17, 3, requires_grad=True)
    (as_map(tokens, 1) * torch.arange(16.0).view(4, 4)).sum().backward()
    assert torch.equal(tokens.grad, torch.arange(-1.0, 16).clamp(min=0)[None, :, None].expand(2, 17, 3))
    assert as_map(tokens, 1).data_ptr() == tokens[:, 1:].data_ptr()


def test_tokens_from_before_the_prefix_are_complete():
    tokens = torch.randn(2, 16, 3)
    assert torch.equal(as_map(tokens, 1).flatten(2), tokens.transpose(1, 2))
    assert as_map(torch.randn(2, 9, 3), 5).shape == (2, 3, 2, 2)  # 9 is also a square


@pytest.mark.parametrize(
    "output", [torch.randn(2, 18, 3), torch.randn(2, 1, 3), torch.randn(2, 3), torch.randn(2, 3, 4, 4, 4), (torch.randn(2, 3),)]
)
def test_other_outputs_are_no_maps(output):
    assert as_map(output, 1) is None


@pytest.mark.parametrize(
    ("arch", "arguments", "number"),
    [
        ("timm/vit_tiny_patch16_224", {"depth": 1}, 1),
        ("timm/deit_tiny_distilled_patch16_224", {"depth": 1}, 2),
        ("timm/vit_tiny_patch16_224", {"depth": 1, "class_token": False, "global_pool": "avg", "reg_tokens": 3}, 3),
        ("timm/cait_xxs24_224", {"depth": 1}, 1),
        ("import:torchvision.models.vision_transformer:VisionTransformer", TORCHVISION, 1),
        ("torchvision/resnet18", {}, 0),
    ],
)
def test_prefix_tokens_are_counted(arch, arguments, number):
    model = build_model(arch, num_classes=4, arch_args=arguments)
    assert prefix_tokens(model, ["blocks.2", "patch_embed", "patch_embed.norm"]) == {
        "blocks.2": number,
        "patch_embed": 0,
        "patch_embed.norm": 0,
    }


def test_tokens_of_a_network_inside_another_are_counted():
    inner = nn.Module()
    inner.cls_token, inner.register_tokens = (nn.Parameter(torch.zeros(1, number, 8)) for number in (1, 4))
    model = nn.Module()
    model.backbone = inner
    assert prefix_tokens(model, ["backbone.blocks"]) == {"backbone.blocks": 5}
    model.num_prefix_tokens = 2
    assert prefix_tokens(model, ["backbone.blocks"]) == {"backbone.blocks": 2}
