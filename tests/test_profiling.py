"""Profiling of a training: a trace with a range for each part of a step, shares that add up to 1, and unchanged results."""

import json
import re
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from kd_accel.profiling import PREFIX, profiler_range, range_shares
from tests.support.in_process import train
from tests.support.launching import metrics
from tests.support.launching import train as launched_train

STEP = {"loader", "teacher", "student", "projector", "loss", "backward", "optimizer", "logging"}


def ranges(path):
    """Return ({range of this package: count}, names of all events) of a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    return {name.removeprefix(PREFIX): names.count(name) for name in set(names) if name.startswith(PREFIX)}, set(names)


def shares(output):
    line = re.search(r"profile: [0-9.]+ ms per step: (.*) \(", output).group(1)
    return {part.split()[0]: float(part.split()[1]) for part in line.split(", ")}


@pytest.mark.slow
def test_each_rank_writes_a_trace_of_the_steps(distilled, tmp_path):
    run_dir = tmp_path / "run"
    done = launched_train(run_dir, *distilled, "--profile=6", "--checkpoint.every_steps=8", processes=2)
    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == ["rank-0.json", "rank-1.json"]
    for rank in (0, 1):
        counts, others = ranges(run_dir / "profile" / f"rank-{rank}.json")
        assert counts.keys() >= STEP | {"checkpoint", "evaluation"}
        assert {counts[name] for name in STEP - {"loader", "logging", "teacher"}} == {6}
        assert counts["teacher"] == 12  # in each step, what the host fetches and what the device computes
        assert any(name.startswith("aten::") for name in others)
    assert done.stdout.count("ms per step") == 1


def test_shares_add_up_and_results_equal_those_without_profiling(distilled, tmp_path):
    output = train(tmp_path / "with", *distilled, "--profile=10")
    train(tmp_path / "without", *distilled)
    found = shares(output)
    assert found.keys() >= STEP and abs(sum(found.values()) - 100) < 1
    assert found["backward"] > found["loss"] > 0 and found["teacher"] > 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert not (tmp_path / "without" / "profile").exists()


def test_training_with_fewer_steps_than_requested(tmp_path):
    output = train(tmp_path / "short", "--train.max_steps=8", "--profile=10")
    counts, _ = ranges(tmp_path / "short" / "profile" / "rank-0.json")
    assert counts["optimizer"] == 3 and "ms per step" in output
    assert "nothing was recorded" in train(tmp_path / "shorter", "--train.max_steps=4", "--profile=10")


def test_time_of_the_projectors_is_counted_once():
    def event(name, us):
        return SimpleNamespace(name=name, device_type=DeviceType.CPU, time_range=SimpleNamespace(elapsed_us=lambda: us))

    times_us = {"student": 40.0, "loss": 30.0, "projector": 10.0, "optimizer": 20.0}
    events = [event("ProfilerStep#1", 100.0), *(event(PREFIX + name, us) for name, us in times_us.items())]
    step_ms, shares = range_shares(events)
    assert step_ms == 0.1
    assert shares == pytest.approx({"student": 0.4, "projector": 0.1, "loss": 0.2, "optimizer": 0.2, "rest": 0.1})


def test_range_is_a_null_context_without_a_profiler():
    with profiler_range("loss") as entered:
        assert entered is None


def test_trace_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("not a directory")
    output = train(tmp_path / "run", "--train.max_steps=12", "--profile=3")
    assert "profile: " in output and "not a directory" not in output and "ms per step" in output
    assert (tmp_path / "run" / "summary.json").exists()
