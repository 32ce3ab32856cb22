"""Tracking with W&B: real offline runs, read back from disk, and failures of the service or the network."""

import io
import json
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError

import numpy as np
import PIL.Image
import psutil
import pytest

from kd_accel.config.schema import TrackingConfig
from kd_accel.errors import UserError
from kd_accel.training.prediction_file import load_predictions
from kd_accel.training.wandb_tracker import (
    WandbTracker,
    choose_mode,
    missing_package_notices,
    refuse_missing_package,
    tracker_name,
)
from tests.support.launching import SMALL, kill_all, metrics, start, train
from tests.support.wandb_reader import read_run, read_summary


@pytest.mark.slow
def test_an_offline_run_holds_config_curves_temperature_and_alpha(tmp_path, distilled):
    flags = ["--tracking.wandb=auto", "--tracking.tags=[small, hybrid]", "--tracking.group=pairs"]
    done = train(tmp_path / "run", *distilled, *flags, processes=2, WANDB_API_KEY="", WANDB_DATA_DIR=str(tmp_path / "data"))
    assert "metrics.jsonl is complete" not in done.stderr
    run = read_run(tmp_path / "run")
    assert (run["job_type"], run["group"], sorted(run["tags"])) == ("distilled", "pairs", ["hybrid", "small"])
    assert run["config"]["optim"]["lr"] == 0.05
    assert run["config"]["distill"]["temperature"]["decay"] == 0.9
    assert {"step", "epoch"} <= set(run["metrics"])
    assert any(name.startswith("train/") for name in run["metrics"])
    tracked = [line for line in run["history"] if "train/loss" in line]
    logged = metrics(tmp_path / "run", "train")
    assert len(tracked) == len(logged) == 24
    for point, line in zip(tracked, logged, strict=True):
        assert point["step"] == line["step"]
        for name in ("loss", "ce", "kl", "features/mse"):
            assert point[f"train/{name}"] == pytest.approx(line[name])
        for name in ("temperature", "alpha", "features/mse/weight"):
            assert point[f"train/{name}"] == line[name]
    assert [line["train/temperature"] for line in tracked][::8] == pytest.approx([4.0, 3.6, 3.24])
    assert [line["train/alpha"] for line in tracked][::8] == pytest.approx([0.8, 0.76, 0.722])
    assert len([line for line in run["history"] if "val/accuracy" in line]) == 3
    assert run["config"]["role"] == "distilled"
    check_errors(tmp_path / "run", tmp_path / "data")
    check_summary(read_summary(tmp_path / "run"), tmp_path / "run")


def check_errors(run_dir, staging):
    """Compare the table of errors and the confusion matrix with the predictions file."""
    stored = load_predictions(run_dir)
    names = json.loads((run_dir / "model.json").read_text())["label_names"]
    (errors,) = (json.loads(path.read_text()) for path in run_dir.glob("wandb/offline-run-*/files/media/table/test/errors_*"))
    assert errors["columns"] == ["image", "label", "prediction", "score", "teacher's prediction"]
    assert len(errors["data"]) == len(stored.error_rows) > 0
    row, (_, label, prediction, score, teacher) = stored.error_rows[0], errors["data"][0]
    found = stored.predictions
    assert [label, prediction, teacher] == [names[of[row]] for of in (found.labels, found.predicted, found.teacher_predicted)]
    assert score == pytest.approx(found.scores[row]) == found.scores[found.labels != found.predicted].max()
    # W&B uploads the table with its pictures as an artifact, whose files it keeps elsewhere until then.
    staged = [path.read_bytes() for path in staging.rglob("tmp*") if path.is_file()]
    shown = [np.asarray(PIL.Image.open(io.BytesIO(content))) for content in staged if content.startswith(b"\x89PNG")]
    assert any(np.array_equal(picture, stored.error_images[0].transpose(1, 2, 0)) for picture in shown)
    (matrix,) = (
        json.loads(path.read_text()) for path in run_dir.glob("wandb/offline-run-*/files/media/table/test/confusion_matrix*")
    )
    assert matrix["columns"] == ["label / prediction", *names] and [line[0] for line in matrix["data"]] == names
    counts = np.array([line[1:] for line in matrix["data"]])
    assert counts.sum() == len(found.labels) and counts.trace() == (found.labels == found.predicted).sum()
    assert counts[0, 1] == ((found.labels == 0) & (found.predicted == 1)).sum()


def check_summary(summary, run_dir):
    written, validations = json.loads((run_dir / "summary.json").read_text()), metrics(run_dir, "val")
    accuracies, losses = ([line[name] for line in validations] for name in ("accuracy", "loss"))
    assert summary["val/accuracy"] == pytest.approx({"last": accuracies[-1], "max": max(accuracies)})
    assert summary["val/loss"] == pytest.approx({"last": losses[-1], "min": min(losses)})
    assert summary["best_val_accuracy"] == max(accuracies)
    assert summary["test/accuracy"] == written["accuracy"]
    assert summary["gap_to_teacher"] == pytest.approx(written["teacher_accuracy"] - written["accuracy"])
    assert summary["parameters"] == written["parameters"] and summary["macs"] > 0
    assert 0 < summary["latency_ms"] < 1000 and summary["latency_device"] == "cpu"
    assert len(summary["data_fingerprint"]) == 32
    assert not [name for name in summary if name.endswith("/samples") or "results" in name]
    assert summary["test/errors"]["_type"] == summary["test/confusion_matrix"]["_type"] == "table-file"
    assert not [name for line in read_run(run_dir)["history"] for name in line if "nrows" in name]


@pytest.mark.slow
def test_a_resumed_run_has_the_same_id_and_a_run_without_a_teacher_the_configured_role(tmp_path):
    flags = [
        "--tracking.wandb=offline",
        "--role=teacher",
        f"--tracking.dir={tmp_path / 'tracking'}",
        "--tracking.log_model=true",
    ]
    train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=3")
    first = read_run(tmp_path / "tracking")
    assert (first["job_type"], first["tags"], first["project"]) == ("teacher", [], "kd-accel")
    (tmp_path / "tracking").rename(tmp_path / "first")
    train(tmp_path / "run", *flags, WANDB_DATA_DIR=str(tmp_path / "data"))
    second = read_run(tmp_path / "tracking")
    assert second["id"] == first["id"] and second["job_type"] == "teacher"
    assert min(line["step"] for line in second["history"] if "train/loss" in line) == 4
    assert [kind for _, kind in first["artifacts"]] == []
    assert ("student-images-teacher", "model") in second["artifacts"], "named like the run"
    staged = {path.read_bytes() for path in (tmp_path / "data").rglob("tmp*") if path.is_file()}
    assert {(tmp_path / "run" / name).read_bytes() for name in ("model.safetensors", "model.json")} <= staged
    assert not (tmp_path / "run/wandb").exists()


@pytest.mark.slow
def test_variables_of_wandb_are_honored_where_the_config_leaves_them_open(tmp_path):
    variables = {
        "WANDB_PROJECT": "pets",
        "WANDB_ENTITY": "team",
        "WANDB_RUN_GROUP": "pairs",
        "WANDB_NAME": "third",
        "WANDB_TAGS": "small,fast",
        "WANDB_JOB_TYPE": "sweep",
        "WANDB_DIR": str(tmp_path / "tracking"),
    }
    train(tmp_path / "run", "--tracking.wandb=offline", "--train.max_steps=2", **variables)
    run = read_run(tmp_path / "tracking")
    assert [run[key] for key in ("project", "entity", "group", "name", "job_type")] == [
        "pets",
        "team",
        "pairs",
        "third",
        "sweep",
    ]
    assert sorted(run["tags"]) == ["fast", "small"]
    flags = ["--tracking.project=cars", "--tracking.group=alone", "--tracking.tags=[own]", f"--tracking.dir={tmp_path / 'own'}"]
    train(tmp_path / "other", "--tracking.wandb=offline", "--train.max_steps=2", *flags, **variables)
    run = read_run(tmp_path / "own")
    assert [run[key] for key in ("project", "group", "tags")] == ["cars", "alone", ["own"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "is_listening", [False, pytest.param(True, marks=pytest.mark.faults)], ids=["refuses", "never_responds"]
)
def test_a_key_without_a_network_is_tracked_offline(tmp_path, is_listening):
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))
        if is_listening:
            host.listen(16)
        started_at = time.monotonic()
        done = train(
            tmp_path / "run",
            "--tracking.timeout_s=3",
            "--tracking.wandb=auto",
            "--train.max_steps=2",
            WANDB_API_KEY="0" * 40,
            WANDB_BASE_URL=f"http://127.0.0.1:{host.getsockname()[1]}",
        )
    # W&B's own service takes half a minute to give up on a host that does not respond.
    assert time.monotonic() - started_at < 60
    assert "online tracking failed" in done.stderr
    assert len(metrics(tmp_path / "run", "train")) == 2
    assert len([line for line in read_run(tmp_path / "run")["history"] if "train/loss" in line]) == 2


@pytest.mark.slow
def test_a_killed_service_does_not_stop_the_training(tmp_path):
    process = start("train", f"--run_dir={tmp_path / 'run'}", *SMALL, "--tracking.wandb=offline", "--train.epochs=40")
    try:
        while "step 20/" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        children = psutil.Process(process.pid).children(recursive=True)
        services = [child for child in children if "wandb" in " ".join(child.cmdline())]
        assert services
        for service in services:
            service.kill()
        process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_all(process)
    assert process.returncode == 0
    assert len(metrics(tmp_path / "run", "train")) == 320


def test_the_mode_depends_on_config_environment_and_netrc(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert choose_mode(TrackingConfig()) == "offline"
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    assert choose_mode(TrackingConfig()) == "online"
    assert choose_mode(TrackingConfig(wandb="disabled")) == "disabled"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode(TrackingConfig()) == "disabled"
    assert choose_mode(TrackingConfig(wandb="offline")) == "offline"


@pytest.fixture
def no_wandb(monkeypatch):
    """Hide the package and its metadata, so that its import raises ImportError."""

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("kd_accel.training.wandb_tracker.version", version)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def tracker(mode, run_dir):
    return WandbTracker(TrackingConfig(wandb=mode), run_dir=run_dir, name="x", role="student")


def test_a_disabled_run_never_imports_wandb(tmp_path, no_wandb, recwarn):
    tracking = tracker("disabled", tmp_path)
    tracking.start(lambda kwargs: pytest.fail("a disabled run was started"))
    tracking.log({"loss": 1.0}, step=1)
    tracking.summarize({"loss": 1.0})
    tracking.log_files([tmp_path])
    tracking.finish()
    assert not tracking.is_enabled and not recwarn.list


@pytest.mark.parametrize("environment_mode", [None, "online", "offline"])
def test_auto_without_the_package_has_a_notice(monkeypatch, no_wandb, environment_mode):
    if environment_mode:
        monkeypatch.setenv("WANDB_MODE", environment_mode)
    config = TrackingConfig(wandb="auto")
    assert choose_mode(config) == "disabled" and tracker_name(config) is None
    assert missing_package_notices(config) == ["wandb is not installed; metrics go to metrics.jsonl only"]
    refuse_missing_package(config)


def test_a_disabled_run_has_no_notice(monkeypatch, no_wandb):
    assert missing_package_notices(TrackingConfig(wandb="disabled")) == []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert missing_package_notices(TrackingConfig(wandb="auto")) == []


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_online_and_offline_without_the_package_are_refused(no_wandb, mode):
    with pytest.raises(UserError, match=f"tracking.wandb: {mode} needs wandb, which is not installed; pip install wandb, or"):
        refuse_missing_package(TrackingConfig(wandb=mode))


def test_no_mode_is_refused_or_has_a_notice_with_the_package():
    for mode in ("online", "offline", "auto", "disabled"):
        config = TrackingConfig(wandb=mode)
        refuse_missing_package(config)
        assert missing_package_notices(config) == []
    assert tracker_name(TrackingConfig(wandb="offline")) == "wandb"
    assert tracker_name(TrackingConfig(wandb="disabled")) is None


def test_a_package_that_cannot_be_imported_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracking = tracker("offline", tmp_path)
    with pytest.warns(UserWarning, match="offline tracking failed .ModuleNotFoundError"):
        tracking.start(lambda kwargs: pytest.fail("a run was started without wandb"))
    assert not tracking.is_enabled


def test_an_error_of_wandb_is_one_warning(tmp_path):
    class Broken:
        def define_metric(self, *args, **kwargs):
            pass

        def log(self, *args, **kwargs):
            raise RuntimeError("no disk")

    tracking = tracker("offline", tmp_path)
    tracking.start(lambda kwargs: Broken())
    assert tracking.is_enabled
    with pytest.warns(UserWarning, match="tracking stopped .RuntimeError: no disk"):
        tracking.log({"loss": 1.0}, step=1)
    tracking.log({"loss": 1.0}, step=2)
    tracking.finish()
    assert not tracking.is_enabled
