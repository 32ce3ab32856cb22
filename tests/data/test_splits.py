"""Training, validation and test samples: their number in each class, and what the choice depends on."""

import numpy as np
import pytest

from kd_accel.config.schema import DataConfig
from kd_accel.data.splits import split_samples


def split(labels, *, num_test=100, num_val=None, **settings):
    return split_samples(np.asarray(labels), DataConfig(**settings), num_val=num_val, num_test=num_test)


def counts(labels, samples):
    return np.bincount(np.asarray(labels)[samples], minlength=int(np.max(labels)) + 1).tolist()


def test_validation_samples_do_not_depend_on_limits():
    labels = np.arange(1000) % 7
    complete = split(labels)
    limited = split(labels, limit_train=90, limit_test=7)
    assert (len(complete.train), len(complete.val), len(complete.test)) == (900, 100, 100)
    assert (len(limited.train), len(limited.val), len(limited.test)) == (90, 10, 7)
    assert set(limited.val) <= set(complete.val)
    assert set(limited.train) <= set(complete.train)
    assert not set(complete.train) & set(complete.val)
    for samples in (complete.train, complete.val, limited.train, limited.val, limited.test):
        assert np.array_equal(samples, np.sort(samples))
    assert len(split(labels, val_fraction=0.0).val) == 0


@pytest.mark.parametrize(
    ("sizes", "fraction", "expected"),
    [
        ((100, 300, 600), 0.1, [10, 30, 60]),
        ((550, 5), 0.1, [55, 1]),  # 55.5 rounds to 56: the larger remainder is that of the small class
        ((13, 12, 15), 0.25, [3, 3, 4]),
        ((1, 1, 98), 0.5, [0, 0, 50]),
        ((3, 3), 0.9, [2, 2]),
        ((1, 1, 1), 0.9, [0, 0, 0]),
    ],
)
def test_each_class_is_held_out_in_proportion_and_keeps_a_training_sample(sizes, fraction, expected):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    held_out = {"val": split(labels, val_fraction=fraction).val}
    held_out["test"] = split(labels, num_test=None, test_fraction=fraction, val_fraction=0.0).test
    for samples in held_out.values():
        assert counts(labels, samples) == expected


def test_equal_remainders_are_ordered_by_chance():
    """20 of 40 classes with five samples each have a validation sample, and these are not the first 20."""
    labels = np.arange(200) % 40
    chosen = np.nonzero(counts(labels, split(labels).val))[0]
    assert len(chosen) == 20
    assert 5 < (chosen < 20).sum() < 15


def test_samples_are_chosen_by_the_partition_into_classes_and_not_by_the_numbers_of_the_classes():
    labels = np.random.default_rng(0).integers(0, 9, 500)
    names = np.random.default_rng(1).permutation(9) * 100
    assert np.array_equal(split(labels).val, split(names[labels]).val)


def test_unlabeled_samples_are_not_held_out():
    labels = np.where(np.arange(300) % 3 == 0, -1, np.arange(300) % 5)
    samples = split(labels, num_test=None, test_fraction=0.2)
    assert len(samples.test) == 40 and len(samples.val) == 16
    assert (labels[samples.test] >= 0).all() and (labels[samples.val] >= 0).all()


def test_test_samples_of_the_training_split_depend_neither_on_validation_nor_on_limits():
    labels = np.arange(1000) % 7
    samples = split(labels, num_test=None, test_fraction=0.2)
    assert (len(samples.train), len(samples.val), len(samples.test)) == (720, 80, 200)
    assert np.array_equal(np.sort(np.concatenate([samples.train, samples.val, samples.test])), np.arange(1000))
    for settings in ({"val_fraction": 0.3}, {"limit_train": 50}, {"view_seed": 5}):
        other = split(labels, num_test=None, test_fraction=0.2, **settings)
        assert np.array_equal(other.test, samples.test)
        assert set(other.train) <= set(range(1000)) - set(samples.test)


def test_a_validation_split_of_its_own_leaves_all_training_samples():
    samples = split(np.arange(100) % 7, num_val=30)
    assert (len(samples.train), len(samples.val), len(samples.test)) == (100, 30, 100)
    limited = split(np.arange(100) % 7, num_val=30, limit_train=50)
    assert (len(limited.train), len(limited.val)) == (50, 15)


def test_the_choice_is_the_same_on_every_machine():
    """Golden values: a change of them separates students from the caches and runs of their teachers."""
    samples = split(np.arange(60) % 4, num_test=None, test_fraction=0.1)
    assert samples.test.tolist() == [30, 31, 34, 36, 44, 57]
    assert samples.val.tolist() == [17, 32, 37, 58, 59]
