"""Tests of the CPU kernels: values, gradients and names equal those of PyTorch's own modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool2d

from kd_accel.models.factory import build_model
from kd_accel.models.inference import ChannelsLastMaxPool2d, OnePixelConv2d, fuse_conv_bn, use_cpu_kernels

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
ONE_PIXEL = [
    # kernel, stride, padding, height and width of the input
    (3, 1, 1, (1, 1)),
    (3, 2, 1, (2, 2)),
    (3, 2, 1, (1, 2)),
    # rows and columns beyond the kernel
    (3, 4, 1, (4, 4)),
    (1, 1, 0, (1, 1)),
    (1, 2, 0, (2, 2)),
    (2, 2, 0, (2, 2)),
    (7, 2, 3, (2, 2)),
    ((3, 1), (2, 1), (1, 0), (2, 1)),
]


@pytest.fixture
def fast(monkeypatch):
    """Return a function that makes PyTorch's own convolution fail from its call on."""

    def fail(self, input, weight, bias):
        raise AssertionError("not a matrix product")

    return lambda: monkeypatch.setattr(OnePixelConv2d, "_conv_forward", fail)


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding", "size"), ONE_PIXEL)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_a_convolution(kernel, stride, padding, size, bias, memory_format, fast):
    torch.manual_seed(0)
    reference = nn.Conv2d(5, 6, kernel, stride, padding, bias=bias).double()
    own = copy.deepcopy(reference)
    use_cpu_kernels(own, CPU)
    assert type(own) is OnePixelConv2d and own.state_dict().keys() == reference.state_dict().keys()
    images = torch.randn(4, 5, *size, dtype=torch.float64).to(memory_format=memory_format)
    weights = torch.randn(4, 6, 1, 1, dtype=torch.float64)
    expected = run(reference, images, weights)
    fast()
    for actual, wanted in zip(run(own, images, weights), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    # DistributedDataParallel copies gradients whose strides differ from those of the weight.
    assert own.weight.grad.stride() == own.weight.stride()


def run(module, images, weights):
    """Return the output and the gradients of input and parameters."""
    own = images.clone().requires_grad_()
    output = module(own)
    (output * weights).sum().backward()
    return [output, own.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("size", [(2, 2), (5, 5), (1, 2)])
def test_outputs_of_several_pixels_use_the_convolution(size):
    reference = nn.Conv2d(3, 4, 3, padding=1)
    own = copy.deepcopy(reference)
    use_cpu_kernels(own, CPU)
    images = torch.randn(2, 3, *size)
    assert torch.equal(own(images), reference(images))
    assert torch.equal(own(images[0]), reference(images[0]))  # one image without a batch


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 1, stride=3, padding=1),
        nn.ConvTranspose2d(4, 4, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    ],
    ids=str,
)
def test_other_convolutions_are_not_changed(module):
    kind = type(module)
    use_cpu_kernels(module, CPU)
    assert type(module) is kind


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1, 1, dilation=2)], ids=str
)
def test_max_pool_is_bitwise_equal(pool, memory_format, monkeypatch):
    """Compare with and without gradients; of equal values in a window, as after a ReLU, the same element has the gradient."""
    torch.manual_seed(0)
    reference, own = copy.deepcopy(pool), copy.deepcopy(pool)
    use_cpu_kernels(own, CPU)
    assert type(own) is ChannelsLastMaxPool2d
    images = (2 * torch.randn(4, 5, 9, 9)).round().relu().to(memory_format=memory_format)
    weights = torch.randn_like(reference(images))
    for actual, wanted in zip(run(own, images, weights), run(reference, images, weights), strict=True):
        assert torch.equal(actual, wanted) and actual.stride() == wanted.stride()
    pooled = []
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.functional, "max_pool2d", lambda maps, *args, **kwargs: pooled.append(maps) or max_pool2d(maps, *args, **kwargs)
        )
        actual = own(images)
    assert pooled[0].is_contiguous(memory_format=torch.channels_last), "not the vectorized kernel"
    assert torch.equal(actual, reference(images)) and actual.stride() == reference(images).stride()
    assert torch.equal(own(images[0]), reference(images[0]))  # one image without a batch


def test_a_pool_with_indices_is_not_changed():
    module = nn.MaxPool2d(2, return_indices=True)
    use_cpu_kernels(module, CPU)
    assert type(module) is nn.MaxPool2d


@pytest.mark.parametrize("arch", ["torchvision/resnet18", "torchvision/resnet50"])
def test_a_network_is_the_same_function(arch):
    torch.manual_seed(0)
    reference = build_model(arch, num_classes=10).train()
    own = copy.deepcopy(reference)
    use_cpu_kernels(own, CPU)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    losses = [nn.functional.cross_entropy(model(images), labels) for model in (own, reference)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = [model.layer4[0].conv2.weight.grad for model in (own, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())
    assert own.state_dict().keys() == reference.state_dict().keys()


@pytest.mark.parametrize(
    ("choice", "device", "kind"),
    [
        ("auto", CPU, OnePixelConv2d),
        ("auto", GPU, nn.Conv2d),
        ("always", CPU, OnePixelConv2d),
        ("always", GPU, OnePixelConv2d),
        ("never", CPU, nn.Conv2d),
        ("never", GPU, nn.Conv2d),
    ],
)
def test_modules_are_converted_for_the_chosen_devices(choice, device, kind):
    module = nn.Conv2d(4, 4, 3)
    use_cpu_kernels(module, device, choice)
    assert type(module) is kind


def test_hooks_and_references_are_kept():
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    convolution, outputs = block[0], []
    convolution.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    use_cpu_kernels(block, CPU)
    assert block[0] is convolution and type(convolution) is OnePixelConv2d
    assert torch.equal(block(torch.ones(2, 3, 1, 1)), outputs[0])


def test_an_output_computed_without_gradients_can_be_modified_in_place():
    module, parameter = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.ones(1))
    use_cpu_kernels(module, CPU)
    with torch.no_grad():
        output = module(torch.randn(2, 3, 1, 1))
    output += parameter
    output.sum().backward()
    assert parameter.grad == 8


@pytest.mark.slow
def test_a_compiled_network_is_the_same_function():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    own = copy.deepcopy(reference)
    use_cpu_kernels(own, CPU)
    own.compile(fullgraph=True)
    images, weights = torch.randn(5, 3, 2, 2), torch.randn(5, 4, 1, 1)
    for actual, wanted in zip(run(own, images, weights), run(reference, images, weights), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_a_fused_network_is_the_same_function():
    model = build_model("torchvision/resnet18", num_classes=10).eval()
    own = fuse_conv_bn(model, layers=["layer4"], image_size=32)
    use_cpu_kernels(own, CPU)
    assert type(own.layer4[0].conv2) is OnePixelConv2d
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(own(images), model(images), rtol=1e-4, atol=1e-4)
