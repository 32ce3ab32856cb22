"""Tests of the 1x1 convolutions: equal to nn.Conv2d in each implementation, and initialized by their own seed."""

import pytest
import torch

from kd_accel.models.projectors import FeatureProjector, seeded_projector

CASES = {
    # number of pixels, input channels, output channels, memory format
    "channels_last": (4, 2, 5, torch.channels_last),
    "no fewer pixels than channels": (20, 3, 16, torch.contiguous_format),
    "fewer pixels than channels": (20, 3, 17, torch.contiguous_format),
    "one pixel": (1, 3, 5, torch.contiguous_format),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_projector_equals_the_convolution(case, dtype):
    """Compare values, memory format and gradients, in float64 and under autocast."""
    pixels, in_channels, out_channels, memory_format = CASES[case]
    torch.manual_seed(0)
    height = 4 if pixels % 4 == 0 else 1
    shape = (3, in_channels, height, pixels // height)
    projector = FeatureProjector(in_channels, out_channels).to(torch.float64 if dtype == torch.float64 else torch.float32)
    feature = torch.randn(shape, dtype=projector.conv.weight.dtype).contiguous(memory_format=memory_format).requires_grad_()
    results = []
    for module in (projector, projector.conv):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = module(feature)
        assert output.dtype == dtype and output.is_contiguous(memory_format=memory_format)
        gradients = torch.autograd.grad(output.square().sum(), [feature, *projector.parameters()])
        results.append([output.detach().to(torch.float64), *(gradient.to(torch.float64) for gradient in gradients)])
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


def test_initial_weights_depend_only_on_seed_and_layer(monkeypatch):
    def weights(layer, seed, before):
        torch.default_generator.manual_seed(before)
        state = torch.get_rng_state()
        projector = seeded_projector(4, 16, layer=layer, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert projector.conv.weight.requires_grad and projector.conv.weight.shape == (16, 4, 1, 1)
        return torch.cat([parameter.detach().flatten() for parameter in projector.parameters()])

    with monkeypatch.context() as patch:
        # Generators of GPUs are not restored afterwards.
        patch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the generators of the GPUs are seeded"))
        assert torch.equal(weights("a", 0, before=1), weights("a", 0, before=2))
    assert not torch.equal(weights("a", 0, before=1), weights("a", 1, before=1))
    assert not torch.equal(weights("a", 0, before=1), weights("b", 0, before=1))
