"""Class weights of the cross-entropy: their definition in float64, and trainings with classes of unequal size."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from kd_accel.builders.labels import class_weights
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.data.datamodule import load_data
from kd_accel.losses.distiller import Distiller
from kd_accel.losses.logits import cross_entropy
from kd_accel.models.factory import build_model
from kd_accel.training.state import needs_buffers_exchanged
from tests.support import launching
from tests.support.in_process import train
from tests.support.launching import SMALL, losses, metrics
from tests.support.resuming import EVERYTHING, assert_same_run

IMBALANCED = ["--data.source=import:tests.support.models:imbalanced_images"]
BALANCED = [*IMBALANCED, "--train.class_weights=balanced"]
FLOAT64 = ["--model.arch=import:tests.support.models:student_float64", "--train.max_steps=6"]
WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 3.0], dtype=torch.float64)


def reference(logits, targets, weights):
    """Compute the mean over the samples of the sum over classes of weight * target * -log p, targets [B, C]."""
    log = logits - logits.exp().sum(1, keepdim=True).log()
    return -(weights * targets * log).sum(1).mean()


def smoothed(targets, smoothing):
    return (1 - smoothing) * targets + smoothing * targets.sum(1, keepdim=True) / targets.shape[1]


@pytest.fixture
def logits():
    return torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("has_unlabeled", [False, True])
def test_labels_are_weighted_by_their_class(logits, smoothing, has_unlabeled):
    labels = torch.arange(12) % 4
    if has_unlabeled:
        labels[[1, 4, 7]] = -1
    targets = smoothed(functional.one_hot(labels.clamp(0), 4).double() * (labels >= 0)[:, None], smoothing)
    settings = {"label_smoothing": smoothing, "has_unlabeled": has_unlabeled}
    found = cross_entropy(logits, labels, class_weights=WEIGHTS, **settings)
    expected = reference(logits, targets, WEIGHTS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)
    plain = cross_entropy(logits, labels, **settings)
    torch.testing.assert_close(cross_entropy(logits, labels, class_weights=torch.ones(4), **settings), plain)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixed_labels_are_weighted_by_each_class(logits, smoothing):
    labels = torch.rand(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels /= labels.sum(1, keepdim=True)
    labels[3] = 0
    found = cross_entropy(logits, labels, label_smoothing=smoothing, class_weights=WEIGHTS)
    torch.testing.assert_close(found, reference(logits, smoothed(labels, smoothing), WEIGHTS), rtol=1e-12, atol=0)


def test_the_mean_does_not_depend_on_the_classes_of_a_part():
    """PyTorch's mean with `weight` divides by the weights of the batch, so that the mean of two halves is not that of both."""
    logits, labels = torch.randn(8, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 3, 3, 3, 3])
    both = cross_entropy(logits, labels, class_weights=WEIGHTS)
    halves = [cross_entropy(logits[part], labels[part], class_weights=WEIGHTS) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(sum(halves) / 2, both)
    torch_halves = [functional.cross_entropy(logits[p], labels[p], WEIGHTS) for p in (slice(0, 4), slice(4, 8))]
    assert abs(sum(torch_halves) / 2 - functional.cross_entropy(logits, labels, WEIGHTS)) > 1e-3


def weights_of(*flags):
    config, _ = parse_config(RunConfig, [*SMALL, *flags])
    data = load_data(config.data)
    return class_weights(config, data), np.bincount(data.train.labels[data.splits.train], minlength=4)


def test_balanced_weights_have_a_mean_of_one_and_give_each_class_the_same_sum():
    weights, counts = weights_of(*BALANCED)
    assert counts.tolist() == [32, 16, 8, 4]
    assert weights == pytest.approx([60 / (4 * count) for count in counts], rel=1e-15)
    assert np.dot(weights, counts) / counts.sum() == pytest.approx(1) and np.ptp(weights * counts) < 1e-9


@pytest.mark.parametrize(
    ("given", "expected"),
    [("[1, 2, 0, 0.5]", [1.0, 2.0, 0.0, 0.5]), ("{blue: 3, red: 0}", [0.0, 1.0, 3.0, 1.0]), ("null", None)],
)
def test_given_weights_are_used_as_they_are(given, expected):
    assert weights_of(f"--train.class_weights={given}")[0] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "train.class_weights: balanced has no effect (each class has 32 training samples); leave it out"),
        (["--train.class_weights=[1, 2]"], "train.class_weights: 2 weights for 4 classes (red, green, blue, ...)"),
        (["--train.class_weights={blu: 2}"], "train.class_weights: 'blu' is not one of the 4 classes; did you mean blue?"),
        (["--train.class_weights=[0, 0, 0, 0]"], "train.class_weights: 0 for every class"),
        (
            ["--data.source=import:tests.support.models:images_without_olive"],
            "balanced divides by the number of training samples of each class, but there are none of 'olive'; remove",
        ),
    ],
)
def test_weights_that_do_not_fit_the_data_are_refused(tmp_path, flags, message):
    assert message in train(tmp_path / "run", "--train.class_weights=balanced", *flags, code=2)
    assert not (tmp_path / "run").exists()


def test_the_first_loss_of_a_training_is_the_weighted_one(tmp_path):
    """The evaluation is not weighted."""
    flags = [*BALANCED, *FLOAT64, "--train.max_steps=1", "--optim.lr=1e-12", "--train.label_smoothing=0.1"]
    train(tmp_path / "run", *flags)
    train(tmp_path / "plain", *flags, "--train.class_weights=null")
    config, _ = parse_config(RunConfig, [*SMALL, *flags])
    data = load_data(config.data)
    ((batch,), *_) = data.train_loader(batch_size=16).epoch(0)
    network = build_model(config.model.arch, num_classes=4, seed=0)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (data.mean, data.std))
    logits = network((batch.images.double() / 255 - mean) / std)
    counts = torch.tensor([32.0, 16.0, 8.0, 4.0], dtype=torch.float64)
    expected = reference(logits, smoothed(functional.one_hot(batch.labels, 4).double(), 0.1), 60 / (4 * counts)).item()
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)
    assert abs(losses(tmp_path / "plain")[0] - expected) > 1e-3
    assert metrics(tmp_path / "run", "val") == metrics(tmp_path / "plain", "val")


def test_accumulation_is_the_big_batch(tmp_path):
    for parts in (1, 4):
        train(tmp_path / str(parts), *BALANCED, *FLOAT64, f"--train.grad_accum_steps={parts}")
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-9)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", *BALANCED, *FLOAT64]
    for processes in (1, 2):
        launching.train(tmp_path / str(processes), *flags, processes=processes)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-9)


def test_a_resumed_training_has_the_same_weights(tmp_path):
    flags = [*EVERYTHING, *BALANCED, "--train.max_steps=8"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "stopped", *flags, "--checkpoint.stop_after_steps=5")
    train(tmp_path / "stopped", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_class_weights_are_not_part_of_the_state():
    """Checkpoints have the same tensors, and the ranks need not exchange the weights."""
    network = build_model("import:tests.support.models:student", num_classes=4)
    plain, weighted = (
        Distiller(network, mean=[0.5] * 3, std=[0.2] * 3, class_weights=weights) for weights in (None, [1.0, 2.0, 3.0, 4.0])
    )
    assert plain.state_dict().keys() == weighted.state_dict().keys()
    assert not needs_buffers_exchanged(weighted)
