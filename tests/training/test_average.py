"""Moving average of the weights, compared with torch's `AveragedModel`, and its use in the evaluations of a training."""

import json

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kd_accel.training.average import MovingAverage
from tests.support.in_process import say, train
from tests.support.launching import losses, metrics


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def changed(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))
    model(torch.randn(5, 3, 6, 6, generator=generator))


def test_the_average_equals_torchs_that_starts_from_the_initial_weights():
    model = network()
    model(torch.randn(5, 3, 6, 6))
    own, torchs = (
        MovingAverage(model, decay=0.9),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False),
    )
    torchs.update_parameters(model)  # the first update of torch's average copies the weights
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


def test_the_average_requires_no_gradient():
    average = MovingAverage(network(), decay=0.9)
    assert not any(weight.requires_grad for weight in average.parameters())


def test_evaluations_run_the_average(tmp_path):
    """The validation and test metrics of a training are those of the saved average; its steps are those without an average."""
    for name, flags in (("plain", []), ("averaged", ["--train.ema_decay=0.99"])):
        train(tmp_path / name, "--train.max_steps=6", *flags)
    assert losses(tmp_path / "averaged") == losses(tmp_path / "plain")
    for split in ("val", "test"):
        (plain,), (averaged,) = (metrics(tmp_path / name, split) for name in ("plain", "averaged"))
        saved = json.loads(say("evaluate", tmp_path / "averaged", f"--split={split}").splitlines()[-1])
        assert averaged["loss"] == pytest.approx(saved["loss"], rel=1e-6)
        assert abs(averaged["loss"] - plain["loss"]) > 1e-3
