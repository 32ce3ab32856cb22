"""Edges of counts: few samples, last batches of one sample, incomplete accumulation windows, the end of an epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd_accel.commands import cache as _cache  # noqa: F401  (its imports, which would be part of the first test's time)
from kd_accel.commands import train as _train  # noqa: F401
from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.models.weights import load_run_model
from kd_accel.training.step import TrainStep
from tests.support import launching
from tests.support.in_process import cache, train
from tests.support.launching import losses, metrics, summary
from tests.support.models import SmallNet
from tests.support.resuming import assert_same_run

BATCHNORM = "--model.arch=import:tests.support.models:student_with_everything"
FLOAT64 = "--model.arch=import:tests.support.models:student_float64"


def cached(directory, *, dtype="float32"):
    return ["--teacher.outputs=cached", f"--teacher.cache.dir={directory}", f"--teacher.cache.dtype={dtype}"]


def weights(run_dir):
    return (Path(run_dir) / "model.safetensors").read_bytes()


@pytest.fixture
def forwards(monkeypatch):
    """Record (module is in training mode, number of images) of each forward of a small network."""
    seen, forward = [], SmallNet.forward

    def recorded(self, images):
        seen.append((self.training, len(images)))
        return forward(self, images)

    monkeypatch.setattr(SmallNet, "forward", recorded)
    return seen


@pytest.fixture
def micro_batches(monkeypatch):
    """Record the sizes of the micro-batches of each optimizer step."""
    seen, step = [], TrainStep.__call__

    def recorded(self, batches, *arguments):
        seen.append([len(batch.labels) for batch in batches])
        step(self, batches, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("samples", [7, 1])
def test_each_of_a_few_test_samples_counts_once_on_two_processes(tmp_path, samples):
    """A sampler that pads to equal shares, as PyTorch's DistributedSampler, would count 8 samples, or 2."""
    flags = [BATCHNORM, f"--data.limit_test={samples}", "--train.eval_batch_size=4", "--train.max_steps=3"]
    launching.train(tmp_path / "run", *flags, "--data.val_fraction=0", processes=2)
    network, card = load_run_model(tmp_path / "run")
    data = load_data(DataConfig(source="import:tests.support.models:images", val_fraction=0, limit_test=samples))
    pixels = torch.from_numpy(data.test.pixels(data.splits.test)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    with torch.no_grad():
        correct = (network((pixels - mean) / std).argmax(1).numpy() == data.test.labels[data.splits.test]).sum()
    last = metrics(tmp_path / "run", "test")[-1]
    assert last["samples"] == samples
    assert last["accuracy"] == summary(tmp_path / "run")["accuracy"] == correct / samples


def test_one_sample_more_than_a_batch_with_batchnorm(tmp_path, distilled, forwards):
    """A training leaves the sample out, and evaluation, fit and cache build compute it in evaluation mode."""
    flags = [BATCHNORM, *distilled, "--data.val_fraction=0", "--data.limit_train=33", "--data.limit_test=33"]
    flags += ["--data.views=1", "--train.epochs=1", "--train.eval_batch_size=16"]
    train(tmp_path / "live", *flags)
    assert {size for training, size in forwards if training and size > 2} == {16}
    assert (False, 1) in forwards and len(losses(tmp_path / "live")) == 2
    assert metrics(tmp_path / "live", "test")[-1]["samples"] == 33
    use = [*cached(tmp_path / "cache"), "--teacher.cache.batch_size=16"]
    cache("build", *flags, *use)
    train(tmp_path / "cached", *flags, *use)
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "live")


@pytest.mark.parametrize("max_steps", [6, 5])
def test_every_step_has_complete_micro_batches(tmp_path, micro_batches, max_steps):
    """35 samples are two steps of 16 in each epoch; the remaining three samples are in no step."""
    flags = [FLOAT64, "--data.val_fraction=0", "--data.limit_train=35", f"--train.max_steps={max_steps}"]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--train.grad_accum_steps=4")
    assert micro_batches == [[16]] * max_steps + [[4] * 4] * max_steps
    assert [line["step"] for line in metrics(tmp_path / "parts", "train")] == list(range(1, max_steps + 1))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-10)
    assert summary(tmp_path / "parts")["steps"] == max_steps


@pytest.mark.slow
def test_feature_terms_compiled_in_two_processes_equal_those_of_one_eager_process(tmp_path, distilled):
    flags = [*distilled, "--train.max_steps=4"]
    train(tmp_path / "eager", *flags)
    launching.train(tmp_path / "compiled", *flags, "--train.compile=true", processes=2)
    eager, compiled = (metrics(tmp_path / name, "train") for name in ("eager", "compiled"))
    assert len(eager) == len(compiled) == 4
    for one, two in zip(eager, compiled, strict=True):
        assert min(one["features/mse"], one["kl"]) > 0.1
        assert all(two[term] == pytest.approx(one[term], rel=1e-4) for term in ("features/mse", "kl", "ce", "loss"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(1, 2), (2, 1), (1, 1)], ids=str)
def test_a_cached_training_resumes_on_the_edge_of_an_epoch(tmp_path, distilled, processes):
    """After 8 of 24 steps the first epoch is complete: the second has its own view, and no step is repeated or left out."""
    before, after = processes
    flags = [*distilled, "--data.views=2", *cached(tmp_path / "cache"), "--train.log_every_steps=3"]
    cache("build", *flags)
    launching.train(tmp_path / "straight", *flags, processes=after)
    launching.train(tmp_path / "moved", *flags, "--checkpoint.stop_after_steps=8", processes=before)
    launching.train(tmp_path / "moved", *flags, "--checkpoint.resume=must", processes=after)
    if before == after:
        assert_same_run(tmp_path / "straight", tmp_path / "moved")
    for one, two in zip(metrics(tmp_path / "straight"), metrics(tmp_path / "moved"), strict=True):
        assert one.pop("split") == two.pop("split")
        assert two == pytest.approx(one, rel=1e-4)


def test_a_few_samples_train_with_features_of_one_pixel(tmp_path, teacher_run):
    """The PCA of 12 maps of one pixel has 11 directions for 16 channels; cached targets equal live ones bit for bit."""
    flags = [f"--teacher.run={teacher_run}", "--distill.features.mse={weight: 0.1, layers: [layer2]}", "--data.image_size=16"]
    flags += ["--teacher.image_size=16"]
    flags += ["--data.val_fraction=0", "--data.limit_train=12", "--train.batch_size=4", "--data.views=2", "--train.epochs=2"]
    output = train(tmp_path / "live", *flags)
    assert "layer2 of the 12 images of the fit varies in 11 directions, fewer than the 16 channels of its target" in output
    assert summary(tmp_path / "live")["explained"] == {"layer2": pytest.approx(1)}
    cache("build", *flags, *cached(tmp_path / "cache"))
    train(tmp_path / "cached", *flags, *cached(tmp_path / "cache"))
    assert weights(tmp_path / "cached") == weights(tmp_path / "live")
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "live")
    assert all(line["features/mse"] > 0 for line in metrics(tmp_path / "live", "train"))


@pytest.mark.parametrize("order", range(10))
def test_a_rare_class_is_shared_out_as_the_others(monkeypatch, order):
    """The validation samples have a tenth of each class, rounded, wherever the five samples of one class are."""
    monkeypatch.setenv("KD_TEST_ORDER", str(order))
    data = load_data(DataConfig(source="import:tests.support.edge_models:images_of_a_rare_class", image_size=8))
    in_train, in_val = (
        np.bincount(data.train.labels[samples], minlength=3) for samples in (data.splits.train, data.splits.val)
    )
    assert (in_train + in_val).tolist() == [300, 250, 5]
    assert in_train[2] >= 4
    assert np.abs(in_val - [30, 25, 0.5]).max() <= 1 and in_val.sum() in (55, 56)
