"""Trainer built in Python: lines of metrics, micro-batches, and errors before the first step."""

from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file

from kd_accel.builders import run as builders_run
from kd_accel.builders.run import build_run
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import notices_of_small_batches
from kd_accel.distributed import start_processes
from tests.support import in_process
from tests.support.launching import SMALL, metrics


@pytest.fixture
def build(tmp_path):
    """Yield a function that builds a run from flags; its resources are closed at the end of the test."""
    with ExitStack() as stack:

        def build(*flags, run_dir="built", scaler=None):
            config, _ = parse_config(RunConfig, [f"--run_dir={tmp_path / run_dir}", *SMALL, *flags])
            accelerator = start_processes(config.train.precision, seed=config.seed)
            accelerator.scaler = scaler
            return build_run(config, accelerator, stack)

        yield build


def test_a_trainer_built_in_python_equals_the_command(tmp_path, build, distilled):
    flags = [*distilled, "--train.max_steps=10", "--train.ema_decay=0.9"]
    run = build(*flags)
    run.trainer.fit()
    in_process.train(tmp_path / "command", *flags)
    found, expected = run.trainer.train_state.average.module.state_dict(), load_file(tmp_path / "command/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(tmp_path / "built") == metrics(tmp_path / "command")[:-1]  # the last line is of the test split


def test_a_line_has_the_means_since_the_previous_line(tmp_path):
    for every in (1, 3):
        in_process.train(tmp_path / str(every), f"--train.log_every_steps={every}", "--train.max_steps=17")
    single = {line["step"]: line for line in metrics(tmp_path / "1", "train")}
    lines, start = metrics(tmp_path / "3", "train"), 0
    assert [line["step"] for line in lines] == [3, 6, 8, 9, 12, 15, 16, 17]  # every third step and the last of each epoch
    for line in lines:
        steps = range(start + 1, line["step"] + 1)
        for name in ("loss", "ce", "accuracy"):
            assert line[name] == pytest.approx(sum(single[step][name] for step in steps) / len(steps))
        assert line["lr"] == single[line["step"]]["lr"]
        start = line["step"]


def test_ranks_exchange_gradients_in_the_last_backward_of_a_step_only(build, monkeypatch):
    run = build("--train.grad_accum_steps=4", "--train.max_steps=2")
    accelerator, guard = run.trainer.accelerator, run.trainer.step.guard
    backward, no_sync, calls = guard.backward, accelerator.no_sync, []
    monkeypatch.setattr(accelerator, "no_sync", lambda module: calls.append("no_sync") or no_sync(module))
    monkeypatch.setattr(guard, "backward", lambda *args, **weight: calls.append("backward") or backward(*args, **weight))
    run.trainer.fit()
    assert calls == [*["no_sync", "backward"] * 3, "backward"] * 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loss_scaler_does_not_change_finite_steps(build, optimizer):
    """A scale that is a power of two is exact. torch's GradScaler for CPUs behaves like that for GPUs."""
    states, scaler = [], torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=4)
    for name, own in (("plain", None), ("scaled", scaler)):
        flags = ["--train.max_steps=6", "--train.grad_accum_steps=2", f"--optim.name={optimizer}"]
        run = build(*flags, run_dir=name, scaler=own)
        run.trainer.fit()
        states.append(run.trainer.train_state.module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert scaler.get_scale() == 2.0**9


def test_only_weights_with_an_effect_are_logged(tmp_path, teacher_run):
    in_process.train(tmp_path / "plain", "--train.max_steps=1")
    teacher = [f"--teacher.run={teacher_run}", "--train.max_steps=1"]
    in_process.train(tmp_path / "logits", *teacher)
    near = "features: {near: {loss: mse, layers: [layer1], args: {pca_images: 64}}}"
    in_process.train(tmp_path / "features", *teacher, f"--distill={{logits: null, label_weight: 1, {near}}}")
    measured = {"step", "epoch", "split", "loss", "ce", "accuracy", "lr"}
    plain, logits, features = (metrics(tmp_path / name, "train")[0].keys() for name in ("plain", "logits", "features"))
    assert plain == measured
    assert logits == measured | {"kl", "agreement", "temperature", "alpha"}
    assert features == measured | {"features/near", "agreement", "features/near/weight", "label_weight"}


def test_a_single_sample_in_a_forward_of_batchnorm_is_refused(tmp_path):
    flags = ["--model.arch=import:tests.support.models:teacher", "--train.batch_size=4", "--train.grad_accum_steps=4"]
    text = in_process.train(tmp_path / "run", *flags, code=2)
    assert "train.batch_size: 4 over 1 processes x 4 accumulation steps is one sample in each forward" in text
    assert "use 8 or more" in text


def test_an_idle_parameter_is_refused(tmp_path):
    text = in_process.train(tmp_path / "run", "--model.arch=import:tests.support.models:with_an_idle_layer", code=2)
    assert "model.arch: no gradient reaches idle.weight, idle.bias" in text and "remove the idle layer" in text


def test_sizes_of_a_forward_reach_the_notice_for_gpus(tmp_path, monkeypatch):
    as_on_a_gpu = lambda device, **sizes: notices_of_small_batches(torch.device("cuda"), **sizes)  # noqa: E731
    monkeypatch.setattr(builders_run, "notices_of_small_batches", as_on_a_gpu)
    flags = ["--data.image_size=24", "--train.grad_accum_steps=2", "--train.max_steps=1"]
    text = in_process.train(tmp_path / "run", *flags)
    expected = "16 over 1 processes x 2 accumulation steps gives 8 images of 24 pixels in a forward pass"
    assert f"train.batch_size: {expected}" in text
