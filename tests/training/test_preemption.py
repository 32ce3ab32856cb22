"""A signal ends a training after a step and a checkpoint, on all ranks at the same step; a resume ends as one never stopped."""

import signal
import time

import pytest

from tests.support import launching
from tests.support.launching import SMALL, kill_all, train
from tests.support.resuming import assert_same_run

pytestmark = pytest.mark.slow

FLAGS = [
    "--train.epochs=40",
    "--model.arch=import:tests.support.models:student_with_everything",
    "--checkpoint.every_epochs=null",
]


def start(run_dir, *flags, processes=1, **environment_changes):
    argv = ["train", f"--run_dir={run_dir}", *SMALL, *FLAGS, *flags]
    return launching.start(*argv, processes=processes, **environment_changes)


def signalled(run_dir, number, *flags, processes=1, at_step=10, **environment_changes):
    """Return (exit code, stderr) of a training that was signaled once it had passed a step."""
    process = start(run_dir, *flags, processes=processes, **environment_changes)
    try:
        while f"step {at_step}/" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        return process.returncode, said
    finally:
        if process.poll() is None:
            kill_all(process)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    runs = {}
    for processes in (1, 2):
        runs[processes] = tmp_path_factory.mktemp("straight") / str(processes)
        train(runs[processes], *FLAGS, processes=processes)
    return runs


AT_LENGTH = pytest.mark.faults


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=AT_LENGTH), pytest.param(signal.SIGUSR1, marks=AT_LENGTH)]
)
def test_one_process(tmp_path, straight, number):
    code, said = signalled(tmp_path / "run", number)
    assert code == 128 + number
    assert f"stopped by {number.name} after step" in said and "Traceback" not in said
    assert not (tmp_path / "run/summary.json").exists()
    train(tmp_path / "run", *FLAGS)
    assert_same_run(straight[1], tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=AT_LENGTH)])
def test_two_processes_stop_at_the_same_step(tmp_path, straight, number):
    """The launcher handles the signals that it is told to, and passes them on."""
    handled = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}
    code, said = signalled(tmp_path / "run", number, processes=2, **handled)
    assert code != 0
    assert said.count(f"stopped by {number.name} after step") == 1
    assert "kd_accel/training" not in said
    train(tmp_path / "run", *FLAGS, processes=2)
    assert_same_run(straight[2], tmp_path / "run")


def test_the_workers_that_load_data_are_signaled_too(tmp_path, straight):
    """A launcher signals whole process groups."""
    code, said = signalled(tmp_path / "run", signal.SIGTERM, "--data.num_workers=1", processes=2)
    assert code != 0
    assert said.count("stopped by SIGTERM after step") == 1
    assert "DataLoader worker" not in said
    train(tmp_path / "run", *FLAGS, processes=2)
    assert_same_run(straight[2], tmp_path / "run")


@AT_LENGTH
def test_a_signal_in_the_first_step(tmp_path, straight):
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter before the handler is installed
    train(tmp_path / "run", *FLAGS)
    assert_same_run(straight[1], tmp_path / "run")


@AT_LENGTH
def test_only_one_rank_is_signaled(tmp_path, straight):
    import psutil

    process = start(tmp_path / "run", processes=2)
    try:
        while "step 10/" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()]
        next(child for child in ranks if child.environ()["RANK"] == "1").send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            kill_all(process)
    assert said.count("stopped by SIGUSR1 after step") == 1
    train(tmp_path / "run", *FLAGS, processes=2)
    assert_same_run(straight[2], tmp_path / "run")


def test_a_dead_rank_leaves_no_process_behind_and_writes_nothing(tmp_path):
    import psutil

    process = start(tmp_path / "run", "--checkpoint.every_steps=5", processes=2)
    try:
        while "step 10/" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        everybody = psutil.Process(process.pid).children(recursive=True)
        ranks = [child for child in everybody if child.status() != psutil.STATUS_ZOMBIE and "RANK" in child.environ()]
        next(child for child in ranks if child.environ()["RANK"] == "1").kill()
        process.communicate(timeout=90)
        assert process.returncode != 0
        assert not [child for child in psutil.wait_procs(ranks, timeout=40)[1] if child.is_running()]
    finally:
        if process.poll() is None:
            kill_all(process)
    steps = [int(path.name.split("-")[1]) for path in (tmp_path / "run/checkpoints").iterdir() if not path.name.startswith(".")]
    assert steps and all(step % 5 == 0 for step in steps)


def test_a_second_signal_stops_at_once(tmp_path):
    process = start(tmp_path / "run", "--model.arch=import:tests.support.models:slow_teacher", KD_TEST_FORWARD_S="7")
    try:
        while not (tmp_path / "run/metrics.jsonl").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(1)  # the file is created a moment before the handler is installed
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert process.poll() is None, "the first one waits for the step to end"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=2) == 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            kill_all(process)
    assert not (tmp_path / "run/checkpoints").exists()
