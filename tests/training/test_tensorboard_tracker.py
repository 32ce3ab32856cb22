"""Tracking with TensorBoard: event files read back by its own reader, over a resume, and a missing package."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_accel.config.schema import TrackingConfig
from kd_accel.errors import UserError
from kd_accel.training.tensorboard_tracker import TensorBoardTracker, refuse_missing_tensorboard
from tests.support.launching import metrics, train


def scalars(directory):
    """Return {name: [(step, value)]} of a directory of event files, as TensorBoard shows them."""
    reader = EventAccumulator(str(directory))
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_points_after_the_checkpoint_are_hidden_by_a_resume(tmp_path):
    for start, end in ((0, 4), (2, 6)):
        tracker = TensorBoardTracker(tmp_path, name="run")
        tracker.start({"seed": start}, step=start)
        for step in range(start + 1, end + 1):
            tracker.log({"train/loss": step + start / 10}, step=step)
        tracker.finish()
    shown = scalars(tmp_path / "run")["train/loss"]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown] == pytest.approx([1.0, 2.0, 3.2, 4.2, 5.2, 6.2])


def test_a_tracker_that_was_not_started_writes_nothing(tmp_path):
    tracker = TensorBoardTracker(tmp_path / "logs", name="run")
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.finish()
    assert not (tmp_path / "logs").exists()


def test_a_directory_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    tracker = TensorBoardTracker(tmp_path / "file", name="run")
    with pytest.warns(UserWarning, match="TensorBoard: tracking stopped .*; metrics.jsonl is complete"):
        tracker.start({}, step=0)
    tracker.log({"train/loss": 1.0}, step=1)
    assert (tmp_path / "file").read_text() == ""


def test_a_missing_package_is_refused(monkeypatch):
    refuse_missing_tensorboard(TrackingConfig(tensorboard=True))
    monkeypatch.setattr("kd_accel.training.tensorboard_tracker.find_spec", lambda name: None)
    refuse_missing_tensorboard(TrackingConfig())
    with pytest.raises(UserError, match="tracking.tensorboard: true needs tensorboard, .* pip install tensorboard"):
        refuse_missing_tensorboard(TrackingConfig(tensorboard=True))


@pytest.mark.slow
def test_a_training_is_tracked_over_a_resume(tmp_path):
    run_dir, flags = tmp_path / "run", ["--tracking.tensorboard=true", f"--tracking.dir={tmp_path / 'logs'}"]
    train(run_dir, *flags, "--checkpoint.stop_after_steps=3")
    train(run_dir, *flags)
    (directory,) = (tmp_path / "logs/tensorboard").glob("run-*")
    shown = scalars(directory)
    for split, name in (("train", "loss"), ("train", "lr"), ("val", "accuracy"), ("test", "loss")):
        expected = [(line["step"], line[name]) for line in metrics(run_dir, split)]
        assert expected and shown[f"{split}/{name}"] == [(step, pytest.approx(value)) for step, value in expected]
