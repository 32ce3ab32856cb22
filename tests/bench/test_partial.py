"""Interrupted measurements: figures of complete rounds, and benchmarks that are stopped by their time limit."""

import time

import pytest
import torch
from torch import nn

from kd_accel.bench.latency import LatencyMeasurement
from kd_accel.bench.provenance import is_measured
from kd_accel.bench.runner import Benchmark, bench_models
from kd_accel.bench.timing import TimeLimit, TimeLimitSpent
from kd_accel.config.schema import BenchConfig
from kd_accel.errors import UserError
from kd_accel.io.files import write_json
from tests.bench.user_models import WARM_UP, Interrupted

SLEEPER = "import:tests.bench.user_models:sleeper"
STUDENT = "import:tests.support.models:student"
INTERRUPTED = "import:tests.bench.user_models:interrupted"
QUICK = BenchConfig(batch_sizes=[1, 1000], device="cpu", min_iterations=20, min_time_s=0.0)


def measurement(models, **settings):
    images = {name: torch.zeros(1) for name in models}
    return LatencyMeasurement(models, images, **{"min_iterations": 40, "min_time_s": 0.0, **settings})


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize(("timed", "expected"), [(3, None), (4 * 1 + 1, 4), (4 * 3 + 4, 12), (40, 36)])
def test_interrupted_measurement_has_the_complete_rounds_of_all_models(name, timed, expected):
    models = {"a": Interrupted(0), "b": Interrupted(0)}
    models[name].at = WARM_UP + timed
    interrupted = measurement(models)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    figures = interrupted.figures()
    assert not interrupted.is_complete
    assert {key: each["iterations"] for key, each in figures.items()} == ({"a": expected, "b": expected} if expected else {})


def test_limit_ends_a_measurement_between_two_forwards():
    limited = measurement({"x": nn.Identity()}, min_time_s=30.0, limit=TimeLimit(0.2))
    started_at = time.monotonic()
    with pytest.raises(TimeLimitSpent):
        limited.run()
    assert time.monotonic() - started_at < 5
    assert not limited.is_complete and limited.figures() == {}


def test_measurement_within_its_limit_is_complete():
    unlimited = measurement({"x": nn.Identity()}, limit=TimeLimit(600))
    unlimited.run()
    assert unlimited.is_complete and unlimited.figures()["x"]["iterations"] == 40


def test_batch_sizes_after_the_limit_are_named(tmp_path):
    limited = QUICK.model_copy(update={"time_limit_s": 0.9})
    figures = bench_models([SLEEPER, STUDENT], limited)
    assert (figures["complete"], figures["stopped_by"]) == (False, "time_limit_s")
    assert figures["not_measured"] == [{"name": SLEEPER, "batch_sizes": [1000]}, {"name": STUDENT, "batch_sizes": [1000]}]
    for entry in figures["models"]:
        assert entry["macs"] > 0
        assert [(latency["batch_size"], latency["complete"]) for latency in entry["latency"]] == [(1, True)]
    write_json({**figures, "models": []}, tmp_path / "limit.json")
    write_json({**figures, "models": [], "stopped_by": "SIGINT"}, tmp_path / "signal.json")
    assert is_measured(tmp_path / "limit.json", [], limited)
    assert not is_measured(tmp_path / "signal.json", [], limited)


def test_limit_that_is_not_reached_changes_nothing():
    figures = bench_models(
        [STUDENT], BenchConfig(batch_sizes=[1], device="cpu", min_iterations=20, min_time_s=0.0, time_limit_s=600)
    )
    assert (figures["complete"], figures["stopped_by"], figures["not_measured"]) == (True, None, [])
    assert figures["models"][0]["latency"][0]["complete"]


def test_interruption_while_models_are_counted_names_all_batch_sizes():
    benchmark = Benchmark([STUDENT, SLEEPER], QUICK, on_model=lambda entry: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        benchmark.run()
    figures = benchmark.figures()
    assert (figures["complete"], figures["stopped_by"]) == (False, "SIGINT")
    assert [entry["name"] for entry in figures["models"]] == [STUDENT] and not benchmark.has_latency
    assert figures["not_measured"] == [{"name": name, "batch_sizes": [1, 1000]} for name in (STUDENT, SLEEPER)]


def test_interrupted_batch_size_is_reported_with_its_complete_rounds():
    lines = []
    benchmark = Benchmark(
        [STUDENT, INTERRUPTED], QUICK, on_latency=lambda entry, latency: lines.append((entry["name"], latency))
    )
    with pytest.raises(KeyboardInterrupt):
        benchmark.run()
    figures = benchmark.figures()
    assert figures["not_measured"] == [{"name": name, "batch_sizes": [1000]} for name in (STUDENT, INTERRUPTED)]
    for entry, line in zip(figures["models"], lines, strict=True):
        (latency,) = entry["latency"]
        assert line == (entry["name"], latency)
        assert (latency["batch_size"], latency["complete"], latency["iterations"]) == (1, False, 6)  # rounds of two


def test_figures_remain_when_a_later_batch_size_does_not_fit_in_memory():
    benchmark = Benchmark([STUDENT], QUICK.model_copy(update={"batch_sizes": [1, 10**9]}))
    with pytest.raises(UserError, match="do not fit in memory"):
        benchmark.run()
    assert benchmark.has_latency and benchmark.figures()["stopped_by"] == "error"
