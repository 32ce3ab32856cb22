"""Training and caches with a validation split of the source, and with test samples from the training split."""

import json

import numpy as np
import pytest

from kd_accel.cache.manifest import read_samples, read_spec
from tests.support.in_process import cache, say, train
from tests.support.launching import losses, metrics, summary

VAL_SPLIT = ["--data.val_split=val", "--data.val_fraction=0.1"]
TEST_FRACTION = ["--data.test_fraction=0.25"]


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [(VAL_SPLIT, {"train": 160, "val": 24, "test": 41}), (TEST_FRACTION, {"train": 96, "val": 24, "test": 40})],
    ids=["val_split", "test_fraction"],
)
def test_cached_equals_live(tmp_path, teacher_run, flags, sizes):
    teacher = [f"--teacher.run={teacher_run}", "--data.views=2", "--teacher.min_accuracy=null", *flags]
    train(tmp_path / "live", *teacher)
    cached = [*teacher, "--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache", "--teacher.cache.dtype=float32"]
    cache("build", *cached)
    train(tmp_path / "cached", *cached)
    assert losses(tmp_path / "live") == losses(tmp_path / "cached")
    assert metrics(tmp_path / "live", "val") == metrics(tmp_path / "cached", "val") != []
    assert read_spec(tmp_path / "cache").samples == sizes
    live, stored = summary(tmp_path / "live"), summary(tmp_path / "cached")
    assert live["accuracy"] == stored["accuracy"]
    assert round(live["accuracy"] * sizes["test"], 6) % 1 == 0


def test_a_cache_without_the_validation_split_is_refused_by_its_setting(tmp_path, teacher_run):
    cached = [
        "--teacher.outputs=cached",
        f"--teacher.run={teacher_run}",
        f"--teacher.cache.dir={tmp_path}/cache",
        "--data.views=1",
    ]
    cache("build", *cached)
    text = train(tmp_path / "run", *cached, *VAL_SPLIT, code=2)
    assert (
        "data.val_split: the validation samples are training samples in the cache, 24 now (number of samples of the split)"
        in text
    )


def test_no_test_sample_of_the_training_split_is_trained_or_validated_on(tmp_path, teacher_run):
    cached = [
        "--teacher.outputs=cached",
        f"--teacher.run={teacher_run}",
        f"--teacher.cache.dir={tmp_path}/cache",
        "--data.views=1",
    ]
    cache("build", *cached, *TEST_FRACTION)
    stored = read_samples(tmp_path / "cache", read_spec(tmp_path / "cache"))
    indices = np.concatenate([samples.indices for samples in stored.values()])
    assert np.array_equal(np.sort(indices), np.arange(160))


def test_a_run_without_a_test_split_is_evaluated_on_its_own_test_samples(tmp_path):
    train(tmp_path / "run", *TEST_FRACTION)
    result = json.loads(say("evaluate", tmp_path / "run").splitlines()[-1])
    assert (result["samples"], result["accuracy"]) == (40, summary(tmp_path / "run")["accuracy"])
