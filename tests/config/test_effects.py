"""Effects of settings on a training, compared with the same step in plain PyTorch."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.models.factory import build_model
from tests.support.in_process import train
from tests.support.launching import SMALL, losses, metrics

FIRST_STEP = ["--train.max_steps=1", "--optim.schedule=constant", "--optim.momentum=0", "--optim.weight_decay=0"]
STATISTICS = ["--data.mean=[0.1, 0.2, 0.3]", "--data.std=[0.9, 0.8, 0.7]"]


def prepared(*flags):
    """Return config, data, network, normalized images in float64, and the first batch of a training with these flags."""
    config, _ = parse_config(RunConfig, [*SMALL, *FIRST_STEP, *flags])
    data = load_data(config.data)
    loader = data.train_loader(batch_size=config.train.batch_size, seed=config.seed)
    ((batch,), *_) = loader.epoch(0)
    network = build_model(config.model.arch, num_classes=len(data.label_names), seed=config.seed)
    return config, data, network, normalized(batch.images, config.data.mean or data.mean, config.data.std or data.std), batch


def normalized(images, mean, std):
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std))
    return (images.double() / 255 - mean) / std


def first_loss(config, network, images, labels):
    """Compute the cross-entropy with label smoothing from its definition."""
    log = network.double()(images).log_softmax(1)
    smoothing = config.train.label_smoothing
    shares = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels, log.shape[1])
    return -((1 - smoothing) * (shares * log).sum(1) + smoothing * log.mean(1)).mean()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(run_dir, *FIRST_STEP)
    return run_dir


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--train.label_smoothing=0.3"],
        ["--data.view_seed=3"],
        ["--data.transform=trivial_augment"],
        ["--data.transform=resized_crop_flip"],
        ["--data.transform={random_crop: {padding: 9}}"],
        ["--data.transform={mixup: {alpha: 1.0}}"],
        ["--data.transform={random_crop: {padding: 4}, cutmix: {p: 0.5}}"],
        ["--seed=3"],
        STATISTICS,
        ["--data.limit_train=40"],
    ],
    ids=str,
)
def test_first_loss_equals_plain_pytorch(tmp_path, plain, flags):
    train(tmp_path / "run", *FIRST_STEP, *flags)
    config, _, network, images, batch = prepared(*flags)
    found = losses(tmp_path / "run")[0]
    assert found == pytest.approx(first_loss(config, network, images, batch.labels).item(), abs=2e-6)
    assert not flags or abs(found - losses(plain)[0]) > 1e-4


def test_evaluation_uses_the_mean_and_std_of_the_config(tmp_path):
    train(tmp_path / "run", *FIRST_STEP, *STATISTICS)
    _, data, network, _, _ = prepared(*STATISTICS)
    network.load_state_dict(load_file(tmp_path / "run/model.safetensors"))
    pixels = torch.from_numpy(np.ascontiguousarray(data.test.pixels(data.splits.test).transpose(0, 3, 1, 2)))
    logits = network.double()(normalized(pixels, [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]))
    expected = functional.cross_entropy(logits, torch.from_numpy(data.test.labels[data.splits.test])).item()
    assert metrics(tmp_path / "run", "test")[0]["loss"] == pytest.approx(expected, abs=2e-6)


def test_bf16_loss_equals_that_under_autocast(tmp_path, plain):
    train(tmp_path / "run", *FIRST_STEP, "--train.precision=bf16")
    config, _, network, images, batch = prepared()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images.float())
    assert logits.dtype == torch.bfloat16
    expected = functional.cross_entropy(logits.float(), batch.labels).item()
    found = losses(tmp_path / "run")[0]
    assert found == pytest.approx(expected, abs=1e-5) and abs(found - losses(plain)[0]) > 1e-5


def updates(run_dir, network):
    """Return the update that the only step has subtracted from each weight, by name."""
    after = load_file(run_dir / "model.safetensors")
    return {name: weight.detach() - after[name] for name, weight in network.named_parameters()}


def test_clip_norm_limits_the_norm_of_the_gradient(tmp_path, plain):
    _, _, network, _, _ = prepared()
    free = math.sqrt(sum(change.square().sum().item() for change in updates(plain, network).values())) / 0.05
    train(tmp_path / "run", *FIRST_STEP, "--optim.clip_norm=0.01")
    clipped = math.sqrt(sum(change.square().sum().item() for change in updates(tmp_path / "run", network).values())) / 0.05
    assert free > 0.1 and clipped == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_adds_its_fraction_of_each_weight_to_the_update(tmp_path, plain):
    _, _, network, _, _ = prepared()
    train(tmp_path / "run", *FIRST_STEP, "--optim.weight_decay=0.5")
    without, with_decay = updates(plain, network), updates(tmp_path / "run", network)
    for name, weight in network.named_parameters():
        torch.testing.assert_close(with_decay[name] - without[name], 0.05 * 0.5 * weight.detach(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("optimizer", [["--optim.momentum=0"], ["--optim.name=adamw"]], ids=str)
def test_norms_and_biases_can_be_left_out_of_the_weight_decay(tmp_path, optimizer):
    flags = ["--model.arch=import:tests.support.models:teacher", *optimizer]
    decay = ["--optim.weight_decay=0.5", "--optim.norm_bias_weight_decay=false"]
    for name, own in (("without", ["--optim.weight_decay=0"]), ("with", decay)):
        train(tmp_path / name, *[flag for flag in FIRST_STEP if not flag.startswith("--optim.momentum")], *flags, *own)
    network = build_model("import:tests.support.models:teacher", num_classes=4, seed=0)
    without, with_decay = (updates(tmp_path / name, network) for name in ("without", "with"))
    for name, weight in network.named_parameters():
        expected = 0.05 * 0.5 * weight.detach().double() if weight.ndim > 1 else torch.zeros_like(weight).double()
        torch.testing.assert_close((with_decay[name] - without[name]).double(), expected, rtol=2e-3, atol=2e-7)


@pytest.mark.parametrize(
    "flags",
    [
        ["--data.num_workers=1"],
        ["--train.channels_last=true"],
        pytest.param(["--train.compile=true"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_settings_for_speed_do_not_change_the_losses(tmp_path, flags):
    train(tmp_path / "plain", "--train.max_steps=6")
    train(tmp_path / "run", "--train.max_steps=6", *flags)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_saved_weights_are_the_moving_average(tmp_path):
    """After two steps the average is decay * first + (1 - decay) * second, because the first step's weights are copied."""
    two_steps = [*FIRST_STEP, "--train.max_steps=2"]
    for name, flags in (("first", FIRST_STEP), ("second", two_steps), ("run", [*two_steps, "--train.ema_decay=0.25"])):
        train(tmp_path / name, *flags)
    assert losses(tmp_path / "run") == losses(tmp_path / "second")
    first, second, averaged = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "run"))
    for name, weight in second.items():
        torch.testing.assert_close(averaged[name], 0.25 * first[name] + 0.75 * weight, rtol=1e-5, atol=1e-7)
