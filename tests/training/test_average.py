"""Moving average of the weights, compared with timm's `ModelEmaV3`, and its use in the evaluations of a training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn

from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.training.average import MovingAverage, decay_after
from tests.support import launching
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


@pytest.mark.parametrize("decay", [0.8, 0.9999])
def test_the_average_equals_timms_in_and_after_the_warm_up(decay):
    """The warm-up to 0.8 ends after 11 steps, that to 0.9999 after a million."""
    model = network()
    own, timms = MovingAverage(model, decay=decay), ModelEmaV3(model, decay=decay, use_warmup=True, exclude_buffers=True)
    for step in range(16):
        changed(model, step)
        own.update(model, step=step)
        timms.update(model, step=step + 1)  # timm counts the step that was just made
        assert own.state_dict().keys() == timms.state_dict().keys()
        assert all(torch.equal(value, timms.state_dict()[name]) for name, value in own.state_dict().items())
    images = torch.randn(5, 3, 6, 6)
    assert torch.equal(own.eval()(images), timms.eval()(images))
    assert not torch.equal(own.module[0].weight, model[0].weight)
    assert torch.equal(own.module[1].running_mean, model[1].running_mean) and own.module[1].num_batches_tracked == 16


def test_the_decay_rises_to_the_setting():
    decays = [decay_after(step, 0.9) for step in range(40)]
    assert decays == sorted(decays) and decays[0] == 0
    assert decays[30] < 0.9 and decays[31:] == [0.9] * 9


def test_the_average_requires_no_gradient():
    average = MovingAverage(network(), decay=0.9)
    assert not any(weight.requires_grad for weight in average.parameters())


def test_an_average_longer_than_the_training_is_near_the_trained_weights(tmp_path):
    """A constant decay of 0.9999 would leave 99.8 % of the initial weights after the 24 steps."""
    for name, flags in (("plain", []), ("averaged", ["--train.ema_decay=0.9999"])):
        train(tmp_path / name, *flags)
    trained, averaged = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "averaged"))
    initial = build_model("import:tests.support.models:student", num_classes=4, seed=0).state_dict()

    def distance(one, other):
        return sum((one[name] - other[name]).square().sum().item() for name in trained) ** 0.5

    assert distance(averaged, trained) < 0.5 * distance(initial, trained)


def test_a_resumed_average_equals_one_that_was_never_stopped(tmp_path):
    """The decay is a function of the position, so that it does not start again from 0."""
    flags = ["--train.ema_decay=0.9999", "--train.max_steps=12"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "stopped", *flags, "--checkpoint.stop_after_steps=5")
    train(tmp_path / "stopped", *flags)
    straight, stopped = (tmp_path / name / "model.safetensors" for name in ("straight", "stopped"))
    assert straight.read_bytes() == stopped.read_bytes()


@pytest.mark.slow
def test_two_processes_give_the_average_of_one(tmp_path):
    flags = ["--train.ema_decay=0.9999", "--train.max_steps=12"]
    for processes in (1, 2):
        launching.train(tmp_path / str(processes), *flags, processes=processes)
    one, two = (load_file(tmp_path / str(processes) / "model.safetensors") for processes in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)


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


def test_the_average_of_a_recorded_network_records_nothing():
    """Maps of an average would be kept by the extractor of the network."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))
    with FeatureExtractor(network, ["0"]) as extractor:
        MovingAverage(network, decay=0.9)(torch.zeros(1, 3, 8, 8))
        assert extractor.take() == {}
        network(torch.zeros(1, 3, 8, 8))
        assert list(extractor.take()) == ["0"]


def test_buffers_that_a_network_replaces_are_copied():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.register_buffer("center", torch.zeros(2))

    network = Replacing()
    average = MovingAverage(network, decay=0.9)
    for step in range(3):
        network.center = network.center + 1
        average.update(network, step=step)
    assert average.module.center.tolist() == [3, 3]
