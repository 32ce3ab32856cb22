"""Losses and gradients that are not finite: the run stops with a message that names step, term, rank and samples."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from kd_accel.config.schema import DataConfig, OptimConfig
from kd_accel.data.loader import epoch_order
from kd_accel.data.splits import split_samples
from kd_accel.distributed import start_processes
from kd_accel.errors import UserError
from kd_accel.losses.distiller import DistillerOutput
from kd_accel.training.average import MovingAverage
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import build_optimizer
from tests.support import in_process
from tests.support.launching import check_message, train
from tests.support.models import SmallNet

BREAKING = ["--model.arch=import:tests.support.models:breaking", "--checkpoint.every_steps=3", "--checkpoint.keep=1"]


def sample_at(position, *, step):
    """Return the sample at a position in the global batch of a step of the first epoch."""
    samples = split_samples(np.arange(160) % 4, DataConfig(val_fraction=0.2), num_test=41).train
    return epoch_order(samples, seed=0, epoch=0)[16 * (step - 1) + position]


class Bench:
    """Model, optimizer, moving average and guard of a training."""

    def __init__(self, *, optimizer="sgd", scaler=None):
        torch.manual_seed(0)
        self.model = SmallNet(4, width=4, norm=True)
        self.average = MovingAverage(self.model, decay=0.9)
        self.accelerator = start_processes("float32")
        self.accelerator.scaler = scaler
        module, own = self.accelerator.prepare(
            self.model,
            build_optimizer(self.model.parameters(), OptimConfig(name=optimizer, lr=0.05, nesterov=optimizer == "sgd")),
        )
        self.optimizer = own
        self.guard = NonFiniteGuard(self.accelerator, module, own)

    def step(self, number, *, factor=1.0, samples=(7, 8, 9, 10)):
        """Run one step on images that depend on `number`, with the loss multiplied by `factor`."""
        generator = torch.Generator().manual_seed(number)
        images = torch.rand(4, 3, 32, 32, generator=generator)
        logits = self.model(images)
        ce = nn.functional.cross_entropy(logits, torch.arange(4)) * factor
        self.guard.backward(DistillerOutput(ce, {"ce": ce}, logits))
        norm = self.guard.gradient_norm()
        self.guard.add(number, [torch.tensor(samples)], self.guard.take())
        self.optimizer.step()
        self.average.update(self.model, step=number)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @property
    def trained(self):
        """Weights and the optimizer's state."""
        optimizer = {
            f"{index}.{name}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        return copy.deepcopy({**dict(self.model.named_parameters()), **optimizer})

    @property
    def state(self):
        """Weights, the optimizer's state, the statistics of BatchNorm and the moving average."""
        average = {f"a.{name}": value for name, value in self.average.state_dict().items()}
        return copy.deepcopy({**self.trained, **dict(self.model.named_buffers()), **average})


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("bad_step", [1, 3])
def test_a_bad_step_changes_no_weight_and_stops_the_run(optimizer, bad_step):
    """Weights and momentum equal those of a run without the bad step, also if it is the first, and `check` finds it later."""
    clean, broken = Bench(optimizer=optimizer), Bench(optimizer=optimizer)
    for number in (1, 2, 3, 4):
        if number == bad_step:
            broken.step(99, factor=torch.inf)
        clean.step(number)
        broken.step(number)
    assert_same(clean.trained, broken.trained)
    assert clean.guard.check() == 0
    broken.step(100, factor=torch.nan)
    with pytest.raises(UserError) as refused:
        broken.guard.check()
    cause = "the loss term ce is not finite on rank 0 (samples 7, 8, 9, 10) at step 99: the training has diverged; "
    assert str(refused.value).startswith(f"{cause}lower optim.lr")


def test_a_guard_does_not_change_finite_steps():
    guarded, bare = Bench(), Bench()
    for number in (1, 2, 3):
        norm = guarded.step(number)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        nn.functional.cross_entropy(bare.model(images), torch.arange(4)).backward()
        expected = torch.cat([weight.grad.flatten() for weight in bare.model.parameters()]).double().norm()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        bare.optimizer.step()
        bare.average.update(bare.model, step=number)
        bare.optimizer.zero_grad()
    assert_same(guarded.state, bare.state)


def test_an_fp16_overflow_is_left_to_the_loss_scaler():
    """torch's GradScaler for CPUs behaves like that for GPUs."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    bench = Bench(scaler=scaler)
    before = {name: tensor.clone() for name, tensor in bench.model.named_parameters()}
    bench.step(1, factor=16.0)
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(before[name], tensor) for name, tensor in bench.model.named_parameters())
    assert bench.guard.check() == 1 and bench.guard.check() == 0
    bench.step(2, factor=16.0)
    bench.step(3, factor=torch.nan)
    with pytest.raises(UserError, match=r"the loss term ce is not finite on rank 0 .* at step 3: the training has diverged"):
        bench.guard.check()


def test_term_step_and_samples_are_named_and_the_checkpoint_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_TEST_BREAKING_STEPS", "5")
    monkeypatch.setenv("KD_TEST_BREAKS", "logits")
    text = in_process.train(tmp_path / "run", *BREAKING, "--train.log_every_steps=20", code=2)
    cause = f"the loss term ce is not finite on rank 0 (the student's logits of sample {sample_at(2, step=5)}) at step 5: "
    assert f"kd-accel: {cause}the training has diverged; lower optim.lr" in text and "Traceback" not in text
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.setenv("KD_TEST_BREAKS", "gradient")
    text = in_process.train(tmp_path / "other", *BREAKING, code=2)
    assert "the gradient of layer1.0.weight is not finite (rank 0 had samples " in text and "at step 5" in text


def test_a_learning_rate_that_is_too_high_is_reported(tmp_path):
    done = train(tmp_path / "run", "--optim.lr=1e30", "--optim.schedule=constant", "--train.log_every_steps=7", code=2)
    check_message(done, "the loss term ce is not finite on rank 0", "at step 2: the training has diverged", "lower optim.lr")
    done = train(tmp_path / "weights", "--optim.lr=1e40", "--optim.schedule=constant", "--checkpoint.every_steps=1", code=2)
    check_message(done, "is not finite after step 1: the training has diverged")


@pytest.mark.slow
@pytest.mark.proof
def test_a_value_that_is_not_finite_on_one_rank_stops_all_ranks(tmp_path):
    """All ranks stop at the same step, and the message is printed once."""
    environment = {"KD_TEST_BREAKING_STEPS": "5,6", "KD_TEST_BREAKING_RANK": "1", "KD_TEST_BREAKS": "logits"}
    done = train(tmp_path / "stopped", *BREAKING, processes=2, code=None, **environment)
    sample = sample_at(10, step=5)
    message = f"the loss term ce is not finite on rank 1 (the student's logits of sample {sample}) at step 5: "
    assert sum(line.startswith("kd-accel: ") and message in line for line in done.stderr.splitlines()) == 1
    assert "kd_accel/training" not in done.stderr
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.slow
def test_weights_that_differ_between_ranks_are_not_saved(tmp_path):
    environment = {"KD_TEST_BREAKING_STEPS": "5", "KD_TEST_BREAKING_RANK": "1", "KD_TEST_BREAKS": "weights"}
    done = train(tmp_path / "run", *BREAKING, processes=2, code=None, **environment)
    message = "kd-accel: the weights of rank 1 differ from those of rank 0 after step 6 (first in layer2.0.weight)"
    assert done.stderr.count(message) == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    train(tmp_path / "run", *BREAKING, processes=2)
