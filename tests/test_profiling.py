"""`--profile`: a trace with a range for each part of a step, shares that add up, and a training with unchanged results."""

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
    """Return ({range of ours: count}, names of all events) of a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    return {name.removeprefix(PREFIX): names.count(name) for name in set(names) if name.startswith(PREFIX)}, set(names)


def shares(said):
    line = re.search(r"profile: [0-9.]+ ms a step: (.*) \(", said).group(1)
    return {part.split()[0]: float(part.split()[1]) for part in line.split(", ")}


@pytest.mark.slow
def test_each_rank_leaves_a_trace_of_the_steps(distilled, tmp_path):
    run_dir = tmp_path / "run"
    done = launched_train(run_dir, *distilled, "--profile=6", "--checkpoint.every_steps=8", processes=2)
    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == ["rank-0.json", "rank-1.json"]
    for rank in (0, 1):
        marks, others = ranges(run_dir / "profile" / f"rank-{rank}.json")
        assert marks.keys() >= STEP | {"checkpoint", "evaluation"}
        assert {marks[name] for name in STEP - {"loader", "logging"}} == {6}
        assert any(name.startswith("aten::") for name in others)
    assert done.stdout.count("ms a step") == 1


@pytest.mark.slow
def test_shares_add_up_and_the_weights_are_those_of_a_run_without_it(distilled, tmp_path):
    said = train(tmp_path / "with", *distilled, "--profile=10")
    train(tmp_path / "without", *distilled)
    found = shares(said)
    assert found.keys() >= STEP and abs(sum(found.values()) - 100) < 1
    assert found["backward"] > found["loss"] > 0 and found["teacher"] > 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    assert not (tmp_path / "without" / "profile").exists()


@pytest.mark.slow
def test_a_training_shorter_than_asked_for(tmp_path):
    said = train(tmp_path / "short", "--train.max_steps=8", "--profile=10")
    marks, _ = ranges(tmp_path / "short" / "profile" / "rank-0.json")
    assert marks["optimizer"] == 3 and "ms a step" in said
    assert "nothing was recorded" in train(tmp_path / "shorter", "--train.max_steps=4", "--profile=10")


def test_the_time_of_the_projectors_is_not_counted_twice():
    def event(name, us):
        return SimpleNamespace(name=name, device_type=DeviceType.CPU, time_range=SimpleNamespace(elapsed_us=lambda: us))

    marks = {"student": 40.0, "loss": 30.0, "projector": 10.0, "optimizer": 20.0}
    events = [event("ProfilerStep#1", 100.0), *(event(PREFIX + name, us) for name, us in marks.items())]
    step_ms, shares = range_shares(events)
    assert step_ms == 0.1
    assert shares == pytest.approx({"student": 0.4, "projector": 0.1, "loss": 0.2, "optimizer": 0.2, "rest": 0.1})


def test_a_mark_does_nothing_while_nothing_is_recorded():
    with profiler_range("loss") as mark:
        assert mark is None


def test_a_trace_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    said = train(tmp_path / "run", "--train.max_steps=12", "--profile=3")
    assert "profile: " in said and "in the way" not in said and "ms a step" in said
    assert (tmp_path / "run" / "summary.json").exists()
