"""Tests of weights stored in the type of autocast: the same bits as under autocast, and networks that are not changed."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kd_accel.losses.targets import PCA
from kd_accel.models.factory import build_model
from kd_accel.models.inference import cast_for_autocast
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import FeatureProjector
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import Batch
from tests.support.models import SmallNet

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


class ReadsWeight(SmallNet):
    """Network that normalizes its classifier's weight in its own forward, in float32."""

    def forward(self, images):
        features = self.layer2(self.layer1(images)).mean((2, 3))
        return functional.linear(features, functional.normalize(self.fc.weight.float()), self.fc.bias)


class WithoutAutocast(SmallNet):
    """Network whose classifier runs outside of autocast."""

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return self.fc(self.layer2(self.layer1(images)).float().mean((2, 3)))


class CountCasts(TorchDispatchMode):
    """Counter of the casts of tensors."""

    casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.casts += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def frozen(network):
    return network.eval().requires_grad_(False)


def test_weights_that_autocast_would_cast_are_cast_once():
    network = frozen(SmallNet(4, width=8, norm=True))
    cast = cast_for_autocast(network, image_size=32, autocast=BF16)
    types = {name: weight.dtype for name, weight in cast.state_dict().items()}
    expected = {name: torch.float32 for name in types if ".1." in name} | {"layer1.1.num_batches_tracked": torch.int64}
    expected |= {"layer2.1.num_batches_tracked": torch.int64}
    assert types == {name: torch.bfloat16 for name in types} | expected
    assert all(weight.dtype == torch.float32 for weight in network.parameters())
    assert not any(weight.requires_grad for weight in cast.parameters())


@pytest.mark.parametrize(
    ("arch", "layer", "channels"),
    [("import:tests.support.models:teacher", "layer2", 32), ("torchvision/mobilenet_v3_small", "features.4", 40)],
)
def test_a_live_teacher_computes_the_same_bits_with_fewer_casts(arch, layer, channels):
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch, outputs, casts = Batch(images, torch.zeros(3), torch.arange(3), 0), [], []
    target = PCA(4)
    target.load(FeatureProjector(channels, 4).state_dict())
    for image_size in (None, 32):
        torch.manual_seed(0)
        network, normalize = build_model(arch, num_classes=4), Normalize([0.5] * 3, [0.25] * 3)
        live = LiveTeacher(network, normalize, targets={layer: target}, autocast=BF16, image_size=image_size)
        with CountCasts() as counter:
            outputs.append(live(batch))
        casts.append(counter.casts)
        live.check_unchanged()
        live.close()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert torch.equal(outputs[0].features[layer], outputs[1].features[layer])
    layers = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    assert casts[0] - casts[1] == sum(1 + (each.bias is not None) for each in layers)


def test_the_network_is_left_as_it_is_without_autocast():
    assert cast_for_autocast(frozen(SmallNet(4, width=8)), image_size=32, autocast=partial(BF16, enabled=False)) is None


@pytest.mark.parametrize("kind", [ReadsWeight, WithoutAutocast])
def test_the_network_is_left_as_it_is_if_a_bit_would_change(kind):
    assert cast_for_autocast(frozen(kind(4, width=8)), image_size=32, autocast=BF16) is None
