"""Multiply-adds: against torchvision's figures and values computed by hand, without a trace in the model or in torch."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model, get_model_weights

from kd_accel.bench.model_stats import count_macs

FAMILIES = [
    "resnet18",
    "resnet50",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
    "regnet_y_400mf",
    "vit_b_16",
    "swin_t",
]
TOKENS, WIDTH = 10, 16
ENCODER_MACS = TOKENS * (3 + 1 + 2 + 2) * WIDTH**2 + 2 * TOKENS**2 * WIDTH
"""Projections to query, key and value, output projection, two layers of 2 x WIDTH channels; products of attention."""


class Encoder(nn.Module):
    """Transformer layer over TOKENS rows of an image, which keeps its last output."""

    def __init__(self, *, needs_values=False):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.needs_values, self.last = needs_values, None

    def forward(self, images):
        assert not self.needs_values or images.abs().sum() > 0
        self.last = self.layer(images[:, 0, :TOKENS, :WIDTH])
        return self.last


class AttentionKernel(nn.Module):
    """Attention with the one function in which a device chooses a kernel."""

    def forward(self, images):
        return nn.functional.scaled_dot_product_attention(images, images, images)


@pytest.fixture
def fused_attention():
    yield set_fused_attn
    set_fused_attn(True)


@pytest.mark.parametrize("name", FAMILIES)
def test_multiply_adds_are_those_that_torchvision_states(name):
    weights = get_model_weights(name).DEFAULT
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = get_model(name, **({"init_weights": False} if name == "inception_v3" else {})).eval()
    size = weights.transforms().crop_size[0]
    assert count_macs(model, torch.zeros(1, 3, size, size)) == pytest.approx(1e9 * weights.meta["_ops"], rel=0.004)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize(("name", "extra_tokens"), [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)])
def test_multiply_adds_of_timm_transformers(fused_attention, name, extra_tokens, is_fused):
    fused_attention(is_fused)
    model = timm.create_model(name).eval()
    patches, width = 14 * 14, 192
    tokens = patches + extra_tokens
    block = tokens * (3 + 1 + 4 + 4) * width**2 + 2 * tokens**2 * width
    expected = patches * (3 * 16 * 16) * width + 12 * block + extra_tokens * width * 1000
    assert model.blocks[0].attn.fused_attn is is_fused
    assert count_macs(model, torch.zeros(1, 3, 224, 224)) == expected


@pytest.mark.parametrize("needs_values", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_multiply_adds_of_attention_do_not_depend_on_the_kernel(needs_values, batch):
    images = torch.randn(batch, 3, 16, WIDTH)
    encoder = Encoder(needs_values=needs_values).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(images)
    assert counter.get_total_flops() // 2 < batch * ENCODER_MACS  # torch's own count misses the fast path
    assert count_macs(encoder, images) == count_macs(encoder.train(), images) == ENCODER_MACS
    assert count_macs(AttentionKernel(), images) == 3 * 2 * 16 * 16 * WIDTH


def test_counting_runs_on_shapes_alone():
    class Recorder(nn.Linear):
        devices = []

        def forward(self, images):
            self.devices.append((images.device.type, self.weight.device.type))
            return super().forward(images)

    assert count_macs(Recorder(32, 2), torch.zeros(1, 3, 32, 32)) == 3 * 32 * 32 * 2
    assert Recorder.devices == [("meta", "meta")]


@pytest.mark.parametrize("is_enabled", [True, False])
def test_counting_leaves_no_trace(is_enabled):
    model, images = Encoder().eval(), torch.randn(2, 3, 16, WIDTH)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.backends.mha.set_fastpath_enabled(is_enabled)
    try:
        count_macs(model, images)
        with pytest.raises(RuntimeError, match="shape"):
            count_macs(nn.Sequential(model, nn.Linear(3, 3)), images)
        assert torch.backends.mha.get_fastpath_enabled() is is_enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.zeros(1).device.type == "cpu"
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model(images).device.type == "cpu" and all(parameter.requires_grad for parameter in model.parameters())
