"""Balanced sampling: as many samples of each class in an epoch, as a pure function of (seed, epoch)."""

import numpy as np
import pytest

from kd_accel.data.loader import epoch_order
from kd_accel.data.sampling import balanced_samples
from tests.support import launching
from tests.support.in_process import cache, train
from tests.support.launching import losses
from tests.support.resuming import EVERYTHING, assert_same_run

BALANCED = ["--data.source=import:tests.support.models:imbalanced_images", "--data.sampling=balanced"]
SIZES = [70, 20, 7, 2, 1]


@pytest.fixture
def samples():
    """Ascending indices with gaps, of classes of 70, 20, 7, 2 and 1 samples; class 3 has no sample."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4, 5], SIZES))
    return 3 * np.arange(len(labels)) + 5, labels


def counted(drawn, samples, labels):
    """Return how often each class was drawn."""
    return np.bincount(labels[np.searchsorted(samples, drawn)], minlength=6)


def test_each_class_is_drawn_equally_often(samples):
    for epoch in range(5):
        drawn = balanced_samples(*samples, seed=1, epoch=epoch)
        assert len(drawn) == 100 and counted(drawn, *samples).tolist() == [20, 20, 20, 0, 20, 20]


def test_the_remainder_goes_to_other_classes_in_each_epoch(samples):
    indices, labels = samples[0][:98], samples[1][:98]
    drawn = [balanced_samples(indices, labels, seed=0, epoch=epoch) for epoch in range(400)]
    counts = np.array([counted(each, indices, labels) for each in drawn])
    filled = np.unique(labels)
    assert (counts.sum(1) == 98).all() and set(counts[:, filled].ravel()) == {19, 20}
    assert np.abs(counts[:, filled].mean(0) - 98 / 5).max() < 0.1


def test_samples_of_a_class_are_drawn_as_often_as_each_other(samples):
    indices, labels = samples
    drawn = balanced_samples(*samples, seed=0, epoch=0)
    for label in np.unique(labels):
        of_class = np.array([np.sum(drawn == index) for index in indices[labels == label]])
        assert of_class.max() - of_class.min() <= 1


def test_every_sample_of_a_large_class_is_drawn_in_some_epoch(samples):
    indices, labels = samples
    often = sum(np.isin(indices[labels == 0], balanced_samples(*samples, seed=0, epoch=epoch)) for epoch in range(200))
    assert often.min() > 200 * 20 / 70 / 2 and often.max() < 200 * 20 / 70 * 1.6


def test_the_order_is_a_function_of_seed_and_epoch(samples):
    orders = {
        (seed, epoch): tuple(epoch_order(samples[0], seed=seed, epoch=epoch, labels=samples[1]))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert orders[2, 1] == tuple(epoch_order(samples[0], seed=2, epoch=1, labels=samples[1]))


def test_copies_of_a_sample_are_spread_over_the_epoch(samples):
    order = epoch_order(samples[0], seed=0, epoch=0, labels=samples[1])
    (only,) = samples[0][samples[1] == 5]
    positions = np.flatnonzero(order == only)
    assert len(positions) == 20 and np.diff(positions).max() > 5 and positions[0] < 30 and positions[-1] > 70


def test_samples_without_a_label_are_used_once_each(samples):
    indices, labels = samples[0], samples[1].copy()
    labels[::4] = -1
    drawn = balanced_samples(indices, labels, seed=0, epoch=0)
    assert len(drawn) == 100
    assert sorted(drawn[np.isin(drawn, indices[::4])]) == indices[::4].tolist()
    of_labeled = drawn[~np.isin(drawn, indices[::4])]
    filled = np.unique(labels[labels >= 0])
    assert np.ptp(counted(of_labeled, *samples)[filled]) <= 1


def test_classes_of_equal_size_are_refused(tmp_path):
    message = train(tmp_path / "run", "--data.sampling=balanced", code=2)
    assert "data.sampling: balanced has no effect (of the training samples each class has 32); leave it out" in message


def test_a_resumed_training_continues_the_epoch(tmp_path):
    flags = [*EVERYTHING, *BALANCED, "--train.max_steps=8"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "stopped", *flags, "--checkpoint.stop_after_steps=5")
    train(tmp_path / "stopped", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    train(tmp_path / "uniform", *flags, "--data.sampling=uniform")
    assert losses(tmp_path / "uniform") != losses(tmp_path / "straight")


@pytest.mark.slow
def test_any_division_of_a_step_has_the_same_samples(tmp_path):
    flags = [*BALANCED, "--model.arch=import:tests.support.models:student_float64", "--train.max_steps=8"]
    for processes, parts in ((1, 1), (1, 4), (2, 2)):
        launching.train(tmp_path / f"{processes}x{parts}", *flags, f"--train.grad_accum_steps={parts}", processes=processes)
    for name in ("1x4", "2x2"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "1x1"), rel=1e-9)


@pytest.mark.slow
def test_cached_outputs_and_unlabeled_samples_work_with_it(tmp_path, distilled):
    """A cache is read by index, and samples of data.unlabeled are added to the labeled ones."""
    more = ["--data.unlabeled=import:tests.support.models:unlabeled_images", "--data.unlabeled_ratio=0.5", "--data.views=2"]
    flags = [*distilled, *BALANCED, *more]
    stored = [*flags, "--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path / 'cache'}", "--teacher.cache.dtype=float32"]
    cache("build", *stored)
    train(tmp_path / "live", *flags)
    train(tmp_path / "cached", *stored)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)
    assert len(losses(tmp_path / "live")) == 3 * ((60 + 30) // 16)
