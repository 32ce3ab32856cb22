"""Steps as a CUDA graph: what can be proven without a GPU, and with one the equality of trainings with and without a graph."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd_accel.builders.trainer import build_schedule
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.losses.distiller import LossWeights
from kd_accel.training.graphed import DeviceWeights, fits, host_state
from kd_accel.training.nonfinite import StepValues, _Forward
from kd_accel.training.optim import build_optimizer, prepare_for_capture, set_learning_rate
from kd_accel.training.step import StepInput
from kd_accel.types import Batch
from tests.support import in_process
from tests.support.launching import SMALL, metrics

CPU = torch.device("cpu")


def step_input(samples=4, *, dtype=torch.uint8, fetched=3):
    images = torch.arange(samples * 12).view(samples, 3, 2, 2).to(dtype)
    batch = Batch(images, torch.arange(samples), torch.arange(samples), view=0)
    return StepInput(batch, torch.arange(samples), (torch.full((samples, 5), float(fetched)),))


def test_only_scheduled_numbers_are_on_the_device():
    falling = "{kind: exponential, start: 4, decay: 0.9, floor: 1}"
    distill = f"{{temperature: {falling}, alpha: 0.5, features: {{mse: {{weight: {{kind: linear, start: 1, end: 0}}}}}}}}"
    config, _ = parse_config(RunConfig, [*SMALL, "--teacher.run=t", f"--distill={distill}"])
    schedule = build_schedule(config, steps_per_epoch=10)
    assert schedule.scheduled == ["temperature", "features/mse"]
    place = DeviceWeights(CPU, schedule.scheduled)
    first = place(schedule.weights_at(0, 0))
    assert (first.temperature.item(), first.alpha, first.label_weight, first.features["mse"].item()) == (4.0, 0.5, None, 1.0)
    second = place(schedule.weights_at(1, 10))
    # A graph has recorded the address of the first value.
    assert second.temperature is first.temperature and first.temperature.item() == pytest.approx(3.6)
    assert second.features["mse"] is first.features["mse"] and first.features["mse"].item() < 1


def test_scheduled_weights_of_teachers_are_on_the_device():
    teachers = "{a: {run: t, weight: {kind: linear, start: 1, end: 0, unit: step}}, b: {run: t2, weight: 3}}"
    config, _ = parse_config(RunConfig, [*SMALL, f"--teachers={teachers}"])
    schedule = build_schedule(config, steps_per_epoch=10)
    assert schedule.scheduled == ["teachers/a"]
    place = DeviceWeights(CPU, schedule.scheduled)
    first = place(schedule.weights_at(0, 0))
    assert (first.teachers["a"].item(), first.teachers["b"]) == (1.0, 3.0)
    assert place(schedule.weights_at(0, 5)).teachers["a"] is first.teachers["a"] and 0 < first.teachers["a"].item() < 1


def test_constant_schedules_and_plain_trainings_have_nothing_on_the_device():
    for flags in (["--teacher.run=t", "--distill.temperature={kind: constant, start: 3}"], []):
        config, _ = parse_config(RunConfig, [*SMALL, *flags])
        assert build_schedule(config, steps_per_epoch=10).scheduled == []


def test_loss_is_equal_for_numbers_and_scalar_tensors():
    from kd_accel.losses.distiller import Distiller
    from kd_accel.losses.logits import KL
    from kd_accel.types import TeacherOutput
    from tests.support.models import student

    torch.manual_seed(0)
    distiller = Distiller(student(4), mean=[0.5] * 3, std=[0.25] * 3, logits=KL())
    images, target = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), TeacherOutput(torch.randn(4, 4))
    numbers = LossWeights(temperature=3.7, alpha=0.3)
    scalars = LossWeights(temperature=torch.tensor(3.7), alpha=torch.tensor(0.3))
    losses = [distiller(images, target, torch.arange(4), weights).loss for weights in (numbers, scalars)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_learning_rate_on_the_device_is_changed_in_place_and_makes_the_same_steps(name):
    from kd_accel.config.schema import OptimConfig

    weights = []
    for is_captured in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = build_optimizer(model.parameters(), OptimConfig(name=name, lr=0.1))
        if is_captured:
            prepare_for_capture(optimizer)
        before = optimizer.param_groups[0]["lr"]
        for lr in (0.1, 0.05, 0.2):
            set_learning_rate(optimizer, lr)
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (optimizer.param_groups[0]["lr"] is before) == is_captured
        assert optimizer.param_groups[0].get("capturable", is_captured) == is_captured
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=0)


def test_packed_values_are_unpacked_into_the_same_values():
    forwards = tuple(
        _Forward({"ce": torch.tensor(1.0 + number), "kl": torch.tensor(2.0)}, torch.arange(3.0), teacher)
        for number, teacher in enumerate((torch.arange(3.0) + 5, None))
    )
    values = StepValues(forwards, torch.tensor([7.0, 8.0]))
    packed = values.packed()
    assert packed.tolist() == [7, 8, 1, 2, 0, 1, 2, 5, 6, 7, 2, 2, 0, 1, 2]
    found = values.unpacked(packed + 1)
    assert found.norms.tolist() == [8, 9]
    assert [forward.terms["ce"].item() for forward in found.forwards] == [2, 3]
    assert found.forwards[0].student.tolist() == [1, 2, 3] and found.forwards[0].teacher.tolist() == [6, 7, 8]
    assert found.forwards[1].teacher is None and found.forwards[0].terms["ce"].shape == ()


def test_inputs_of_another_shape_type_or_order_do_not_fit():
    static = [step_input().clone()]
    assert fits(static, [step_input(fetched=9)])
    assert not fits(static, [step_input(3)]) and not fits(static, [step_input(dtype=torch.float32)])
    assert not fits(static, [step_input(), step_input()])
    images = step_input().batch.images.to(memory_format=torch.channels_last)
    last = StepInput(replace(step_input().batch, images=images), step_input().index, step_input().fetched)
    assert not fits(static, [last])


class Stateful(torch.nn.Module):
    """Module whose forward changes state of the host, by name."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.register_buffer("center", torch.zeros(2))

    def forward(self):
        if self.change == "python":
            random.random()
        elif self.change == "numpy":
            np.random.rand()
        elif self.change == "torch":
            torch.rand(1)
        elif self.change == "buffer":
            self.center = self.center + 1
        else:
            self.center += 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("python", ["the state of Python's random generator"]),
        ("numpy", ["the state of NumPy's random generator"]),
        ("torch", ["the state of PyTorch's random generator on the CPU"]),
        ("buffer", ["a weight or buffer by another tensor"]),
        ("in place", []),
    ],
)
def test_state_of_the_host_that_a_graph_would_not_change_is_found(change, expected):
    module = Stateful(change)
    before, kept = host_state(module), module.center  # a freed buffer could give its address to the next one
    module()
    assert kept is not None
    assert [name for name, value in host_state(module).items() if before[name] != value] == expected


def test_a_copy_of_inputs_shares_no_memory():
    own = step_input()
    for tensor, other in zip(own.tensors, own.clone().tensors, strict=True):
        assert torch.equal(tensor, other) and tensor.data_ptr() != other.data_ptr()


def test_always_is_refused_without_a_gpu(tmp_path):
    text = in_process.train(tmp_path / "run", "--train.cuda_graph=always", code=2)
    assert "train.cuda_graph: always needs one process with a GPU, but no GPU was found; use auto" in text


def test_always_is_refused_with_compile(tmp_path):
    text = in_process.train(tmp_path / "run", "--train.cuda_graph=always", "--train.compile=true", code=2)
    assert "train.cuda_graph" in text and "train.compile" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU")
def test_a_graph_changes_no_bit_of_a_training(tmp_path, distilled):
    flags = [*distilled, "--train.deterministic=true", "--train.max_steps=12", "--train.log_every_steps=1"]
    for choice in ("never", "always"):
        in_process.train(tmp_path / choice, *flags, f"--train.cuda_graph={choice}")
    assert metrics(tmp_path / "never") == metrics(tmp_path / "always")
    never, always = ((tmp_path / choice / "model.safetensors").read_bytes() for choice in ("never", "always"))
    assert never == always
