"""Learning rate as a function of the step, compared with torch's schedulers, and the settings of the optimizer."""

import math

import pytest
import torch

from kd_accel.config.schema import OptimConfig
from kd_accel.errors import UserError
from kd_accel.training.optim import build_optimizer, learning_rate, prepare_for_capture, set_learning_rate
from tests.support.in_process import train
from tests.support.resuming import EVERYTHING, assert_same_run


def rates(optim, total_steps, steps_per_epoch=10):
    return [
        learning_rate(optim, step=step, total_steps=total_steps, steps_per_epoch=steps_per_epoch) for step in range(total_steps)
    ]


def torch_rates(build_scheduler, total_steps, lr):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = build_scheduler(optimizer)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_equals_torchs_scheduler():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40), 40, 0.3)
    assert rates(OptimConfig(lr=0.3, schedule="cosine"), 40) == pytest.approx(expected, rel=1e-12)


def test_step_equals_torchs_scheduler():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [20, 30], gamma=0.2), 40, 0.3)
    assert rates(OptimConfig(lr=0.3, schedule="step", step_epochs=[2, 3], step_gamma=0.2), 40) == pytest.approx(expected)


def test_constant_with_warmup_rises_linearly():
    found = rates(OptimConfig(lr=0.4, schedule="constant", warmup_fraction=0.1), 40)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4] + [0.4] * 36)


def test_onecycle_has_the_peak_and_the_ends_of_torchs_scheduler():
    found = rates(OptimConfig(lr=0.5), 1000)
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=1000, pct_start=0.3), 1000, 0.5
    )
    assert max(found) == pytest.approx(0.5)
    assert found.index(max(found)) == 299
    assert max(abs(mine - theirs) for mine, theirs in zip(found, expected, strict=True)) < 0.5 * 0.006
    assert found[0] < 0.5 / 20
    assert found[-1] < 1e-4


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
@pytest.mark.parametrize("total_steps", [1, 2, 7])
def test_short_runs_have_finite_positive_rates(schedule, total_steps):
    found = rates(OptimConfig(lr=0.5, schedule=schedule, warmup_fraction=0.5), total_steps)
    assert all(math.isfinite(rate) and 0 < rate <= 0.5 for rate in found)


def test_the_settings_reach_the_optimizer():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2), requires_grad=False)]
    sgd = build_optimizer(parameters, OptimConfig(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1))
    adamw = build_optimizer(parameters, OptimConfig(name="adamw", lr=0.3, betas=[0.8, 0.9], weight_decay=0.2))
    group = sgd.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"], len(group["params"])) == (0.8, True, 0.1, 1)
    assert (adamw.param_groups[0]["betas"], adamw.param_groups[0]["weight_decay"]) == ((0.8, 0.9), 0.2)
    set_learning_rate(adamw, 0.01)
    assert adamw.param_groups[0]["lr"] == 0.01


def test_a_model_without_trained_parameters_is_refused():
    with pytest.raises(UserError, match="no parameter that can be trained"):
        build_optimizer([torch.nn.Parameter(torch.zeros(2), requires_grad=False)], OptimConfig())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_have_a_group_without_decay(name):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    network.scale = torch.nn.Parameter(torch.ones(()))
    optim = OptimConfig(name=name, weight_decay=0.1, norm_bias_weight_decay=False)
    decayed, others = build_optimizer(network.parameters(), optim).param_groups
    names = {id(parameter): key for key, parameter in network.named_parameters()}
    assert [names[id(parameter)] for parameter in decayed["params"]] == ["0.weight", "3.weight"]
    assert {names[id(parameter)] for parameter in others["params"]} == {"scale", "0.bias", "1.weight", "1.bias", "3.bias"}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    (only,) = build_optimizer([network.scale], optim).param_groups
    assert only["weight_decay"] == 0.0
    optimizer = build_optimizer(network.parameters(), optim)
    set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    prepare_for_capture(optimizer)
    set_learning_rate(optimizer, 0.02)
    assert [group["lr"].item() for group in optimizer.param_groups] == [pytest.approx(0.02)] * 2


def test_a_model_without_norms_and_biases_needs_no_second_group():
    with pytest.raises(UserError, match="norm_bias_weight_decay: false has no effect, because the model has no norm or bias"):
        build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], OptimConfig(norm_bias_weight_decay=False))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_resumed_training_has_the_same_two_groups(tmp_path, distilled, name):
    """Restored moments belong to their parameters: those of the groups are in another order than the network has them."""
    own = ["--optim.nesterov=false", f"--optim.name={name}", "--optim.weight_decay=0.1", "--optim.norm_bias_weight_decay=false"]
    flags = [*distilled, *EVERYTHING, *own, "--train.max_steps=10"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "stopped", *flags, "--checkpoint.stop_after_steps=5")
    train(tmp_path / "stopped", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
