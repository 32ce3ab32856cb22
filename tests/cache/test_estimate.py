"""Estimates of `kd-accel plan` from measured rates: sizes, times, break-even and recommendation."""

import json

import pytest

from kd_accel.cache.estimate import Measured, PlannedTraining, costs, recommend
from tests.support.caches import FEATURE
from tests.support.launching import SMALL, run

MEASURED = Measured(view_s=1e-5, teacher_s=2e-3, student_s=3e-3, write_bytes_per_s=1e9, read_bytes_per_s=2e9)
TRAINING = PlannedTraining(samples=45_000, views=4, epochs=30, processes=2, sample_bytes=15_380)


def test_break_even_is_the_first_epoch_in_which_cached_is_cheaper():
    found = costs(MEASURED, TRAINING)

    def live(epochs):
        return epochs * found["live_epoch_s"]

    def cached(epochs):
        return found["build_s"] + epochs * found["cached_epoch_s"]

    even = found["break_even_epoch"]
    assert even == 5  # four views, and the cost of writing them and of creating views twice
    assert cached(even) < live(even)
    assert cached(even - 1) >= live(even - 1)


def test_costs_are_proportional_to_the_number_of_students():
    found = costs(MEASURED, TRAINING)
    assert found["live_epoch_s"] == pytest.approx(22_500 * 5.01e-3)
    one, two = found["students"][:2]
    assert two["live_s"] == pytest.approx(2 * one["live_s"])
    assert two["cached_s"] - one["cached_s"] == pytest.approx(30 * found["cached_epoch_s"])
    assert one["cached_s"] < one["live_s"]


def result(*, measured=MEASURED, free=1e12, **training):
    changed = PlannedTraining(**{**vars(TRAINING), **training})
    size = changed.samples * changed.views * changed.sample_bytes
    return {
        "kind": "logits",
        "bytes": {"logits": size},
        "free_bytes": free,
        "training": vars(changed),
        **costs(measured, changed),
    }


def test_recommendations():
    assert recommend(result()).startswith("cached: the cache pays off after epoch 5 of 30")
    assert recommend(result(views=30)).startswith("cached for 2 or more students")
    assert recommend(result(views=400)).startswith("live: the cache pays off only after")
    assert "are free" in recommend(result(free=1e9))
    slow_disk = Measured(**{**vars(MEASURED), "read_bytes_per_s": 1e6})
    assert recommend(result(measured=slow_disk)).startswith("live: on this machine, reading a sample takes longer")


def test_plan_measures_this_machine_and_writes_nothing(tmp_path, teacher_run):
    cache_dir = tmp_path / "deep/cache"
    flags = [
        f"--teacher.run={teacher_run}",
        "--teacher.outputs=cached",
        f"--teacher.cache.dir={cache_dir}",
        FEATURE,
        "--data.views=30",
    ]
    found = json.loads(run("plan", *SMALL, *flags, "--json").stdout.splitlines()[-1])
    assert found["bytes_per_sample_and_view"] == {
        "logits": 4 * 2,
        "logits and raw features": 4 * 2 + 2 * (16 * 64 + 32 * 4),
        "logits and projected features": 4 * 2 + 2 * (8 * 64 + 16 * 4),
    }
    assert found["bytes"]["logits and raw features"] == 128 * 30 * found["bytes_per_sample_and_view"]["logits and raw features"]
    assert all(value > 0 for value in found["measured"].values())
    assert not list(tmp_path.iterdir())
    text = run("plan", *SMALL, *flags).stdout
    for part in ("logits and raw features", "<- this config", "break-even", "10 students", "recommendation:"):
        assert part in text
    assert "nothing to plan" in run("plan", *SMALL, code=2).stderr
