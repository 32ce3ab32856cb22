"""Layers in the forms that are fast on a CPU: same values, gradients and names as torch's own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool2d

from kd_accel.models.cpu_kernels import ChannelsLastMaxPool2d, OnePixelConv2d, use_cpu_kernels
from kd_accel.models.factory import build_model
from kd_accel.models.fusion import fuse_conv_bn

CPU = torch.device("cpu")
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]
ONE_PIXEL = [
    # kernel, stride, padding, height and width of the input
    (3, 1, 1, (1, 1)),
    (3, 2, 1, (2, 2)),
    (3, 2, 1, (1, 2)),
    (3, 4, 1, (4, 4)),  # samples and columns beyond the kernel
    (1, 1, 0, (1, 1)),
    (1, 2, 0, (2, 2)),
    (2, 2, 0, (2, 2)),
    (7, 2, 3, (2, 2)),
    ((3, 1), (2, 1), (1, 0), (2, 1)),
]


@pytest.fixture
def fast(monkeypatch):
    """Fails where torch's own convolution runs."""

    def refuse(self, input, weight, bias):
        raise AssertionError("not as a matrix product")

    return lambda: monkeypatch.setattr(OnePixelConv2d, "_conv_forward", refuse)


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
    for found, request in zip(run(own, images, weights), expected, strict=True):
        torch.testing.assert_close(found, request, rtol=1e-12, atol=1e-12)
    assert own.weight.grad.stride() == own.weight.stride()  # or DistributedDataParallel would copy it


def run(module, images, weights):
    """Output, and the gradients of input and parameters."""
    own = images.clone().requires_grad_()
    output = module(own)
    (output * weights).sum().backward()
    return [output, own.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("size", [(2, 2), (5, 5), (1, 2)])
def test_more_pixels_are_left_to_the_convolution(size):
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
def test_other_convolutions_stay_what_they_are(module):
    kind = type(module)
    use_cpu_kernels(module, CPU)
    assert type(module) is kind


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 1, 1, dilation=2)], ids=str
)
def test_a_maximum_is_the_same_to_the_bit(pool, memory_format, monkeypatch):
    """With gradients and without them. Equal values in a window, as after a ReLU, give their gradient to the same one."""
    torch.manual_seed(0)
    reference, own = copy.deepcopy(pool), copy.deepcopy(pool)
    use_cpu_kernels(own, CPU)
    assert type(own) is ChannelsLastMaxPool2d
    images = (2 * torch.randn(4, 5, 9, 9)).round().relu().to(memory_format=memory_format)
    weights = torch.randn_like(reference(images))
    for found, request in zip(run(own, images, weights), run(reference, images, weights), strict=True):
        assert torch.equal(found, request) and found.stride() == request.stride()
    memory_formats = []
    with monkeypatch.context() as patch:
        patch.setattr(
            nn.functional,
            "max_pool2d",
            lambda maps, *args, **kwargs: memory_formats.append(maps) or max_pool2d(maps, *args, **kwargs),
        )
        found = own(images)
    assert memory_formats[0].is_contiguous(memory_format=torch.channels_last), "the kernel that is fast"
    assert torch.equal(found, reference(images)) and found.stride() == reference(images).stride()
    assert torch.equal(own(images[0]), reference(images[0]))  # one image without a batch


def test_a_pool_that_gives_indices_stays_what_it_is():
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
    profiler_range = [model.layer4[0].conv2.weight.grad for model in (own, reference)]
    torch.testing.assert_close(*profiler_range, rtol=1e-3, atol=1e-3 * profiler_range[1].abs().max().item())
    assert own.state_dict().keys() == reference.state_dict().keys()


def test_elsewhere_than_on_a_cpu_nothing_changes():
    module = nn.Conv2d(4, 4, 3)
    use_cpu_kernels(module, torch.device("cuda", 0))
    assert type(module) is nn.Conv2d


def test_the_output_can_be_written_to_in_every_mode():
    module, parameter = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.ones(1))
    use_cpu_kernels(module, CPU)
    with torch.no_grad():
        output = module(torch.randn(2, 3, 1, 1))
    output += parameter
    output.sum().backward()
    assert parameter.grad == 8


@pytest.mark.slow
def test_a_compiled_network_has_them():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    own = copy.deepcopy(reference)
    use_cpu_kernels(own, CPU)
    own.compile(fullgraph=True)
    images, weights = torch.randn(5, 3, 2, 2), torch.randn(5, 4, 1, 1)
    for found, request in zip(run(own, images, weights), run(reference, images, weights), strict=True):
        torch.testing.assert_close(found, request, rtol=1e-4, atol=1e-5)


def test_a_folded_network_can_have_them():
    model = build_model("torchvision/resnet18", num_classes=10).eval()
    own = fuse_conv_bn(model, layers=["layer4"], image_size=32)
    use_cpu_kernels(own, CPU)
    assert type(own.layer4[0].conv2) is OnePixelConv2d
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(own(images), model(images), rtol=1e-4, atol=1e-4)
