"""Run directory: which trainings may resume in it, files of a finished run, full and read-only disks, two trainings at once."""

import json
import os
import resource
import shutil
import subprocess

import pytest

from kd_accel.builders.run import run_directory
from kd_accel.config.parsing import load_config_file
from kd_accel.config.schema import RunConfig
from kd_accel.errors import UserError
from kd_accel.training.checkpoint import find_checkpoint
from tests.support import in_process
from tests.support.launching import SMALL, kill_all, metrics, start, summary, train


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run of one epoch that no test here changes."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    in_process.train(run_dir, "--train.epochs=1", "--checkpoint.every_steps=3", "--checkpoint.keep=9")
    return run_dir


@pytest.fixture
def copied(done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def train_again(run_dir, *flags, code=0):
    """Run the command of `done` in a directory."""
    return in_process.train(run_dir, "--train.epochs=1", "--checkpoint.every_steps=3", "--checkpoint.keep=9", *flags, code=code)


def contents(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_finished_run_needs_no_checkpoints(copied):
    shutil.rmtree(copied / "checkpoints")
    before = contents(copied)
    assert "finished already" in train_again(copied)
    assert contents(copied) == before


def test_a_finished_run_of_another_training_is_refused(copied, monkeypatch):
    shutil.rmtree(copied / "checkpoints")
    before = contents(copied)
    assert "optim.lr: 0.05 in the run, 0.06 now" in train_again(copied, "--optim.lr=0.06", code=2)
    monkeypatch.setenv("KD_TEST_NOISE_SEED", "9")
    assert "was trained on other data (digest:" in train_again(copied, code=2)
    monkeypatch.delenv("KD_TEST_NOISE_SEED")
    (copied / "config.yaml").unlink()
    assert "config.yaml: is missing or damaged" in train_again(copied, code=2)
    assert contents(copied).keys() == before.keys() - {copied / "config.yaml"}


def test_a_finished_student_of_another_teacher_is_refused(tmp_path, teacher_run):
    shutil.copytree(teacher_run, tmp_path / "teacher")
    flags = [f"--teacher.run={tmp_path / 'teacher'}", "--train.max_steps=2"]
    in_process.train(tmp_path / "run", *flags)
    data = bytearray((tmp_path / "teacher/model.safetensors").read_bytes())
    data[-2] ^= 1
    (tmp_path / "teacher/model.safetensors").write_bytes(data)
    assert "was trained with the teacher" in in_process.train(tmp_path / "run", *flags, code=2)


def test_a_finished_student_does_not_need_its_cache(tmp_path, teacher_run):
    flags = [f"--teacher.run={teacher_run}", "--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path / 'cache'}"]
    flags += ["--data.views=1", "--train.max_steps=2"]
    in_process.cache("build", *flags)
    in_process.train(tmp_path / "run", *flags)
    shutil.rmtree(tmp_path / "cache")
    assert "finished already" in in_process.train(tmp_path / "run", *flags)


def test_damaged_checkpoints_do_not_start_from_scratch(copied):
    for name in ("summary.json", "model.safetensors"):
        (copied / name).unlink()
    for path in (copied / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    before = contents(copied)
    with pytest.warns(UserWarning, match=r"step-00000008 is passed over: state.json is damaged"):
        text = train_again(copied, code=2)
    assert "holds no intact checkpoint" in text and "remove the directory" in text
    assert contents(copied) == before


def test_a_pause_that_is_past_or_beyond_the_end_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    assert "stop_after_steps: 8 has no effect" in train_again(run_dir, "--checkpoint.stop_after_steps=8", code=2)
    assert "paused after step 5" in train_again(run_dir, "--checkpoint.stop_after_steps=5")
    assert "is already at step 5; raise it" in train_again(run_dir, "--checkpoint.stop_after_steps=5", code=2)
    assert "is already at step 5" in train_again(run_dir, "--checkpoint.stop_after_steps=4", code=2)
    train_again(run_dir, "--checkpoint.stop_after_steps=7")
    train_again(run_dir)
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 8


@pytest.mark.parametrize("path", ["/proc/kd_accel/run", "/dev/null/run", "file/run", "file"])
def test_a_path_that_cannot_be_a_run_directory_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("")
    text = in_process.train(tmp_path / path, code=2)
    assert text.count("kd-accel: ") == 1
    assert "is a file; name a directory" in text or "cannot write or read /proc/kd_accel" in text or "is not writable" in text


def test_nothing_is_written_next_to_the_run_directory(tmp_path, teacher_run):
    text = in_process.train(tmp_path / "run", f"--teacher.run={teacher_run}", "--train.max_steps=2")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    accuracy = summary(tmp_path / "run")["teacher_accuracy"]
    assert accuracy == summary(teacher_run)["accuracy"]
    assert text.count(f", live, accuracy {100 * accuracy:.2f} % on the test samples") == 1


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_disk_that_fills_up_keeps_the_last_good_state(tmp_path, small_disk, processes):
    """Metrics and checkpoints grow until the disk is full."""
    flags = ["--train.epochs=10", "--checkpoint.every_steps=2", "--checkpoint.keep=99"]
    ended = train(small_disk / "run", *flags, processes=processes, code=None)
    messages = [line for line in ended.stderr.splitlines() if line.startswith("kd-accel: ")]
    assert len(messages) == 1, ended.stderr[-3000:]
    assert "cannot write" in messages[0] and "No space left" in messages[0]
    assert "kd_accel/" not in ended.stderr.replace(str(small_disk), ""), "a traceback of a rank"
    assert find_checkpoint(small_disk / "run/checkpoints") is not None
    shutil.move(small_disk / "run", tmp_path / "run")
    train(tmp_path / "run", *flags, processes=processes)
    train(tmp_path / "straight", *flags, processes=processes)
    assert_same_training(tmp_path / "run", tmp_path / "straight")


def assert_same_training(one, other):
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["run/checkpoints", "run/metrics.jsonl"])
def test_a_path_that_becomes_read_only_is_reported(tmp_path, path):
    """The path is made immutable, also for root, at the tenth step."""
    process = start("train", f"--run_dir={tmp_path / 'run'}", *SMALL, "--train.epochs=20", "--checkpoint.every_steps=5")
    try:
        while "step 10/" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        if subprocess.run(["chattr", "+i", tmp_path / path], capture_output=True, check=False).returncode:
            pytest.skip("files cannot be made immutable here")
        _, stderr = process.communicate(timeout=60)
    finally:
        subprocess.run(["chattr", "-i", tmp_path / path], capture_output=True, check=False)
        if process.poll() is None:
            kill_all(process)
    assert process.returncode == 2 and stderr.count("kd-accel: ") == 1
    assert "not permitted" in stderr and "Traceback" not in stderr
    train(tmp_path / "run", "--train.epochs=20", "--checkpoint.every_steps=5")
    train(tmp_path / "straight", "--train.epochs=20", "--checkpoint.every_steps=5")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_disk_that_is_full_when_the_results_are_due(tmp_path, small_disk, processes):
    run_dir, flags = small_disk / "run", ["--model.arch=import:tests.support.models:mortal"]
    happens = {"KD_TEST_AT": "test:24", "KD_TEST_HAPPENS": str(small_disk / "ballast")}
    ended = train(run_dir, *flags, processes=processes, code=2 if processes == 1 else None, **happens)
    assert ended.stderr.count("kd-accel: ") == 1 and "No space left" in ended.stderr
    # The disk fills up during the evaluation on the test samples, before which the model is written.
    model = (run_dir / "model.safetensors").read_bytes()
    assert not (run_dir / "summary.json").exists()
    (small_disk / "ballast").unlink()
    train(run_dir, *flags, processes=processes)
    train(tmp_path / "straight", *flags, processes=processes)
    assert_same_training(run_dir, tmp_path / "straight")
    assert (run_dir / "model.safetensors").read_bytes() == model


def opened(run_dir):
    """Return the `RunDirectory` of a run that has been moved."""
    config = load_config_file(RunConfig, run_dir / "config.yaml")
    return run_directory(config.model_copy(update={"run_dir": str(run_dir)}))


def test_a_training_that_ended_while_another_started(done, copied):
    """The second training has checked the directory before it gets the lock."""
    for name in ("summary.json", "model.safetensors"):
        (copied / name).unlink()
    directory, newest = opened(copied), find_checkpoint(copied / "checkpoints")
    os.close(directory.claim(resumed_from=newest))
    for name in ("summary.json", "model.safetensors"):
        shutil.copy(done / name, copied / name)
    before = contents(copied)
    for seen in (newest, None):
        with pytest.raises(
            UserError, match="run_dir: another training has run in .* while this one started; run the command again"
        ):
            directory.claim(resumed_from=seen)
    assert contents(copied) == before


def test_a_full_disk_leaves_the_config_of_the_run(copied):
    for name in ("summary.json", "model.safetensors"):
        (copied / name).unlink()
    before = contents(copied)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    directory = opened(copied)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            directory.write_config()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert contents(copied) == before


def test_two_trainings_in_one_place(tmp_path):
    run_dir = tmp_path / "run"
    first = start("train", f"--run_dir={run_dir}", *SMALL, "--train.epochs=200")
    try:
        while "step 2/" not in first.stdout.readline():
            assert first.poll() is None
        text = train(run_dir, "--train.epochs=200", code=2).stderr
        assert "another training is running in" in text and "use another run_dir" in text
    finally:
        first.kill()
        first.wait()
    assert (
        "another training" not in train(run_dir, "--train.epochs=200", "--checkpoint.stop_after_steps=100000", code=None).stderr
    )
