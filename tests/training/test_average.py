"""The moving average of the weights against torch's own, and through a checkpoint."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd_accel.training.average import MovingAverage


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def changed(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))
    model(torch.randn(5, 3, 6, 6, generator=generator))


def test_it_is_torchs_average_that_starts_at_the_initial_weights():
    model = network()
    model(torch.randn(5, 3, 6, 6))
    own, torchs = (
        MovingAverage(model, decay=0.9),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False),
    )
    torchs.update_parameters(model)  # its first update copies: here the initial weights
    for step in range(4):
        changed(model, step)
        own.update(model)
        torchs.update_parameters(model)
    images = torch.randn(5, 3, 6, 6)
    assert own.state_dict().keys() == torchs.state_dict().keys() - {"n_averaged"}
    assert all(torch.equal(value, torchs.state_dict()[name]) for name, value in own.state_dict().items())
    assert torch.equal(own.eval()(images), torchs.eval()(images))
    assert not torch.equal(own.module[0].weight, model[0].weight)
    assert torch.equal(own.module[1].running_mean, model[1].running_mean) and own.module[1].num_batches_tracked == 5


def test_it_takes_part_in_no_gradient():
    average = MovingAverage(network(), decay=0.9)
    assert not any(weight.requires_grad for weight in average.parameters())
