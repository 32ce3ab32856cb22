"""Stop of a training by a signal: after a step and a checkpoint, on all ranks at the same step. The resumed run is the same."""

import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.holding import Hold, wait_until
from tests.support.launching import ROOT, SMALL, environment, free_port, kill_all, last_lines, ranks_of, start, train
from tests.support.resuming import assert_same_run

pytestmark = pytest.mark.slow

FLAGS = [
    "--train.epochs=5",
    "--model.arch=import:tests.support.models:mortal",
    "--checkpoint.every_epochs=null",
]
"""Forty steps."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the directories of runs that were never stopped, by number of processes."""
    runs = {}
    for processes in (1, 2):
        runs[processes] = tmp_path_factory.mktemp("straight") / str(processes)
        train(runs[processes], *FLAGS, processes=processes)
    return runs


@pytest.fixture
def held(tmp_path):
    """Function that starts a training of two processes and returns (launcher, hold) when both ranks are held after 10 steps."""
    hold = Hold(tmp_path / "hold", step=10)
    launchers = []

    def start_held(*flags, patch="holds", **environment_changes):
        argv = ["train", f"--run_dir={tmp_path / 'run'}", *SMALL, *FLAGS, *flags]
        launchers.append(start(*argv, processes=2, patch=patch, **hold.environment, **environment_changes))
        hold.wait_for_ranks(*launchers)
        return launchers[0], hold

    yield start_held
    for launcher in launchers:
        kill_all(launcher)


def stopped_after(stderr, name):
    """Return the step after which both ranks, held after ten steps, have stopped.

    An exchange of the ranks begins after 11 to 16 steps, as they exchange every sixteenth step at most by then, and ends one
    step later.
    """
    (step,) = re.findall(rf"kd-accel: stopped by {name} after step (\d+), with a checkpoint", stderr)
    assert 12 <= int(step) <= 17, stderr
    return int(step)


def stderr_of(launcher):
    """Return what a launcher has printed when it has failed."""
    _, stderr = launcher.communicate(timeout=240)
    assert launcher.returncode != 0
    return stderr


AT_LENGTH = pytest.mark.faults


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=AT_LENGTH), pytest.param(signal.SIGUSR1, marks=AT_LENGTH)]
)
def test_one_process(tmp_path, straight, number):
    """The model sends the signal in the tenth step."""
    at_step_10 = {"KD_TEST_AT": "train:10", "KD_TEST_HAPPENS": str(int(number))}
    done = train(tmp_path / "run", *FLAGS, code=128 + number, **at_step_10)
    assert f"stopped by {number.name} after step 10" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run/summary.json").exists()
    train(tmp_path / "run", *FLAGS)
    assert_same_run(straight[1], tmp_path / "run")


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=AT_LENGTH)])
def test_two_processes_stop_at_the_same_step(tmp_path, held, straight, number):
    """The launcher handles the signals that it is told to, and forwards them."""
    launcher, _ = held(PET_SIGNALS_TO_HANDLE="SIGTERM,SIGINT,SIGUSR1")
    launcher.send_signal(number)
    stderr = stderr_of(launcher)
    stopped_after(stderr, number.name)
    assert "kd_accel/training" not in stderr
    train(tmp_path / "run", *FLAGS, processes=2)
    assert_same_run(straight[2], tmp_path / "run")


def test_the_workers_that_load_data_are_signaled_too(tmp_path, held, straight):
    """A launcher signals process groups."""
    launcher, _ = held("--data.num_workers=1")
    launcher.send_signal(signal.SIGTERM)
    stderr = stderr_of(launcher)
    stopped_after(stderr, "SIGTERM")
    assert "DataLoader worker" not in stderr
    train(tmp_path / "run", *FLAGS, processes=2)
    assert_same_run(straight[2], tmp_path / "run")


@AT_LENGTH
def test_a_signal_in_the_first_step(tmp_path, straight):
    process = start("train", f"--run_dir={tmp_path / 'run'}", *SMALL, *FLAGS)
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    # Before the handler is installed the signal ends the process by its default action.
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    train(tmp_path / "run", *FLAGS)
    assert_same_run(straight[1], tmp_path / "run")


def test_only_one_rank_is_signaled(tmp_path, held, straight):
    """The launcher, which has not been signaled, ends with the report of the processes."""
    launcher, hold = held()
    ranks_of(launcher)[1].send_signal(signal.SIGUSR1)
    hold.release()
    stderr = stderr_of(launcher)
    text = f"stopped by SIGUSR1 after step {stopped_after(stderr, 'SIGUSR1')}, with a checkpoint; run the same command again"
    assert text in last_lines(stderr)
    train(tmp_path / "run", *FLAGS, processes=2)
    assert_same_run(straight[2], tmp_path / "run")


@pytest.mark.proof
@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=AT_LENGTH)])
def test_a_dead_rank_leaves_no_process_behind_and_writes_nothing(tmp_path, held, dead):
    """The launcher sends SIGTERM to the survivor as soon as the rank has died."""
    launcher, hold = held("--checkpoint.every_steps=5")
    everybody = psutil.Process(launcher.pid).children(recursive=True)
    ranks_of(launcher)[dead].kill()
    hold.release()
    stderr = stderr_of(launcher)
    assert not psutil.wait_procs(everybody, timeout=60)[1]
    written = {path.name for path in (tmp_path / "run/checkpoints").iterdir() if not path.name.startswith(".")}
    assert "step-00000005" in written and written <= {"step-00000005", "step-00000010"}
    text = f"rank {1 - dead} of 2 has lost its peers after step 10 ("
    assert stderr.count(f"kd-accel: {text}") == 1, stderr
    assert text in last_lines(stderr) and "run the same command again to resume" in last_lines(stderr), stderr
    assert "kd_accel/training" not in stderr


def test_lost_peers_are_reported_before_a_slow_end(held):
    """The survivor is still writing a checkpoint when its launcher sends SIGTERM."""
    launcher, hold = held("--checkpoint.every_steps=5", patch="closes_slowly")
    ranks_of(launcher)[1].kill()
    hold.release()
    stderr = stderr_of(launcher)
    text = "rank 0 of 2 has lost its peers after step 10 ("
    assert stderr.count(f"kd-accel: {text}") == 1 and text in last_lines(stderr), stderr


@AT_LENGTH
def test_a_stop_that_a_hung_peer_prevents_is_reported(held):
    """Rank 0 is in a collective, where Python handles no signal, until its launcher kills it."""
    launcher, hold = held()
    ranks_of(launcher)[1].send_signal(signal.SIGSTOP)
    hold.release()
    launcher.send_signal(signal.SIGTERM)
    stderr = stderr_of(launcher)
    assert stderr.count("kd-accel: rank 0 of 2 has not stopped within 25 s of the signal") == 1, stderr


AGREEMENT = """
import os, signal, sys
from kd_accel.distributed import peers_needed, start_processes
from kd_accel.exit_codes import exit_codes
from kd_accel.training import preemption

preemption._AGREEMENT_S = 1.0
with exit_codes():
    accelerator = start_processes("float32")
    handler = preemption.PreemptionHandler(accelerator)
    with handler.installed(), peers_needed(accelerator, lambda: "in the test"):
        handler.requested()
        if accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                handler.requested()
        sys.stdin.read()
"""

STEPS = """
import os, signal, sys, time
import torch
from kd_accel.distributed import start_processes
from kd_accel.exit_codes import exit_codes
from kd_accel.training.preemption import PreemptionHandler, preempted

step_s, signaled, exchanges, all_reduce = float(sys.argv[1]), int(sys.argv[2]), 0, torch.distributed.all_reduce

def counted(*arguments, **options):
    global exchanges
    exchanges += 1
    return all_reduce(*arguments, **options)

torch.distributed.all_reduce = counted
with exit_codes():
    accelerator = start_processes("float32")
    handler = PreemptionHandler(accelerator)
    with handler.installed():
        for step in range(1, 1000):
            time.sleep(step_s * (1 + accelerator.process_index))
            if step == signaled and accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            number = handler.requested()
            if number:
                print(step, exchanges, flush=True)
                raise preempted(number, step=step)
"""
"""Steps that take twice as long on rank 1, which signals itself."""


@pytest.fixture
def start_ranks():
    """Function that starts two processes of a script without a launcher, which would end one when the other ends."""
    ranks = []

    def start_both(script, *arguments):
        joined = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        for rank in ("0", "1"):
            changes = {"RANK": rank, "LOCAL_RANK": rank, **joined}
            argv, pipe = [sys.executable, "-c", script, *map(str, arguments)], subprocess.PIPE
            ranks.append(
                subprocess.Popen(argv, cwd=ROOT, env=environment(**changes), stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            )
        return ranks

    yield start_both
    for rank in ranks:
        kill_all(rank)


@pytest.mark.parametrize(
    ("step_s", "signaled", "stopped", "exchanges"),
    [(0.001, 300, range(301, 310), range(38, 46)), (0.3, 3, [4], [4])],
    ids=["fast", "slow"],
)
def test_ranks_agree_within_a_second_or_a_step(start_ranks, step_s, signaled, stopped, exchanges):
    """Fast steps are followed by an exchange from time to time, and steps of more than half a second by one each."""
    ended = [(rank.communicate(timeout=120), rank.returncode) for rank in start_ranks(STEPS, step_s, signaled)]
    assert [code for _, code in ended] == [128 + signal.SIGTERM] * 2, ended
    (printed, same) = (stdout.split() for (stdout, _), _ in ended)
    assert printed == same and int(printed[0]) in stopped and int(printed[1]) in exchanges, printed


def test_a_peer_that_does_not_agree_to_stop_is_lost(start_ranks):
    """The exchange has a shorter timeout after a signal, because a launcher kills the process after 30 seconds."""
    rank = start_ranks(AGREEMENT)[0]
    _, stderr = rank.communicate(timeout=120)
    assert rank.returncode == 1
    assert stderr.count("kd-accel: rank 0 of 2 has lost its peers in the test (Operation timed out!): ") == 1, stderr
    assert "Traceback" not in stderr


def test_a_second_signal_stops_at_once(tmp_path):
    """The first signal does not end a step."""
    hold = Hold(tmp_path / "hold", step=0)
    process = start("train", f"--run_dir={tmp_path / 'run'}", *SMALL, patch="holds_on", **hold.environment)
    try:
        hold.wait_for_ranks(process, ranks=1)
        process.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert process.poll() is None
        while process.poll() is None:  # a signal within two seconds after the first one was received has no effect
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        kill_all(process)
    assert not (tmp_path / "run/checkpoints").exists()
