"""Exit codes of one process and of several, and the paragraphs that explain them, without torch and without a launcher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from tests.support.holding import handles, wait_until
from tests.support.launching import ROOT, environment

PROGRAM = """
import ctypes, os, pathlib, signal, sys, threading, time
from kd_accel import exit_codes
from kd_accel.errors import PeerLost, Preempted, UserError
exit_codes._LAUNCHER_WAIT_S = float(sys.argv[3])
exit_codes._SLOW_STOP_S = 0.2

def ready():
    pathlib.Path(sys.argv[2]).touch()

def block():
    "Wait forever in a call that no signal interrupts, as one of NCCL."
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

with exit_codes.exit_codes():
    exec(sys.argv[1])
"""
MISTAKE = "raise UserError('field: 1 is not valid')"
WAIT = "ready(); time.sleep(60)"


class Ranks:
    """Processes of one node. This process is their launcher."""

    def __init__(self, directory):
        self.directory = directory
        self.processes = []

    def start(self, body, *, wait_s=0.2, **changes):
        rank = len(self.processes)
        self.file(rank).parent.mkdir()
        ready = self.directory / f"ready-{rank}"
        launch = {"RANK": str(rank), "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(self.file(rank)), **changes}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, body, ready, str(wait_s)],
            cwd=ROOT,
            env=environment(**launch),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        if "ready()" in body:
            wait_until(lambda: ready.exists() or process.poll() is not None)
        return process

    def file(self, rank):
        return self.directory / str(rank) / "error.json"

    def terminate_waiting(self, rank):
        """Send SIGTERM to a process that waits for its launcher, with the default action for the signal."""
        process = self.processes[rank]
        wait_until(lambda: process.poll() is not None or not handles(process.pid, signal.SIGTERM))
        process.terminate()

    def end(self):
        """Wait for all processes. Returns [exit code and stderr of each]."""
        errors = [process.communicate(timeout=60)[1] for process in self.processes]
        return list(zip([process.returncode for process in self.processes], errors, strict=True))


@pytest.fixture
def ranks(tmp_path):
    started = Ranks(tmp_path)
    yield started
    for process in started.processes:
        process.kill()
        process.communicate()


def test_mistake_of_all_ranks_is_printed_once_whichever_rank_is_first(ranks):
    for body in (f"time.sleep(1); {MISTAKE}", MISTAKE):
        ranks.start(body)
    (code_0, stderr_0), (code_1, stderr_1) = ranks.end()
    assert (code_0, code_1) == (2, 2)
    assert stderr_0 + stderr_1 == "kd-accel: field: 1 is not valid\n"


def test_different_mistakes_are_both_printed(ranks):
    for field in ("one", "two"):
        ranks.start(f"raise UserError('{field}: 1 is not valid')")
    assert sorted(ranks.end()) == [(2, "kd-accel: one: 1 is not valid\n"), (2, "kd-accel: two: 1 is not valid\n")]


def test_mistake_that_a_launcher_ends_is_not_printed_again(ranks):
    """A launcher ends all processes when the first one has ended."""
    first = ranks.start(MISTAKE)
    assert first.wait(timeout=60) == 2
    ranks.start("ready(); raise UserError('another: 1 is not valid')", wait_s=60)
    ranks.terminate_waiting(1)
    assert ranks.end() == [(2, "kd-accel: field: 1 is not valid\n"), (-signal.SIGTERM, "")]


def test_second_node_leaves_the_first_one_time_to_report(ranks):
    ranks.start(f"ready(); {MISTAKE}", wait_s=60, GROUP_RANK="1")
    ranks.terminate_waiting(0)
    assert ranks.end() == [(-signal.SIGTERM, "")]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (MISTAKE, "field: 1 is not valid"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise Preempted(10, 'stopped')", "stopped"),
        ("raise PeerLost('lost')", "lost"),
    ],
)
def test_launcher_prints_the_report(ranks, body, expected):
    """torch's own classes read the file."""
    ranks.start(body)
    ((code, stderr),) = ranks.end()
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=code, error_file=str(ranks.file(0)))
    summary = str(ChildFailedError("kd_accel", {0: failure}))
    *_, last, rule = summary.splitlines()
    assert last == f"  {expected}" and set(rule) == {"="}
    assert stderr.rstrip().endswith(expected)


def test_report_replaces_no_device(ranks):
    ranks.start(MISTAKE, TORCHELASTIC_ERROR_FILE=os.devnull)
    assert ranks.end() == [(2, "kd-accel: field: 1 is not valid\n")]
    assert not Path(os.devnull).is_file()


def test_single_process_raises_and_reports(ranks):
    ranks.start("1 / 0", WORLD_SIZE="1")
    ((code, stderr),) = ranks.end()
    assert code == 1 and stderr.count("Traceback") == 1
    assert "ZeroDivisionError" in json.loads(ranks.file(0).read_text())["message"]["message"]


def test_loss_of_peers_is_not_printed_when_a_process_has_reported_the_cause(ranks):
    first = ranks.start(MISTAKE)
    assert first.wait(timeout=60) == 2
    ranks.start("ready(); exit_codes.report_lost_peers('lost'); raise PeerLost('lost')", wait_s=60)
    ranks.terminate_waiting(1)
    assert ranks.end()[1] == (-signal.SIGTERM, "")


def test_loss_of_peers_is_printed_at_once_and_once(ranks):
    """SIGTERM of the launcher does not end the process in its clean-up."""
    body = """
try:
    exit_codes.report_lost_peers('lost')
    raise PeerLost('lost')
finally:
    ready()
    time.sleep(1)
"""
    ranks.start(body).terminate()
    assert ranks.end() == [(1, "kd-accel: lost\n")]


def test_error_in_the_clean_up_after_a_loss_is_not_printed(ranks):
    body = """
try:
    exit_codes.report_lost_peers('lost')
    raise PeerLost('lost')
finally:
    1 / 0
"""
    ranks.start(body)
    assert ranks.end() == [(1, "kd-accel: lost\n")]


def test_sigterm_is_reported_once(ranks):
    for body in (WAIT, "ready(); block()"):
        ranks.start(body)
    for process in ranks.processes:
        process.terminate()
    ended = ranks.end()
    assert [code for code, _ in ended] == [128 + signal.SIGTERM] * 2
    text = "kd-accel: stopped by SIGTERM, because another process has failed or the launch was stopped. "
    assert "".join(stderr for _, stderr in ended).startswith(text) and ended[0][1] + ended[1][1] in (ended[0][1], ended[1][1])


def test_worker_that_the_same_signal_ends_is_not_reported(ranks):
    """torch's handler of SIGCHLD raises an error for a DataLoader worker that was killed; the thread is slower here."""
    body = """
handle = exit_codes._Process.handle_sigterm
exit_codes._Process.handle_sigterm = lambda self: (time.sleep(0.5), handle(self))
def raise_error(*_):
    raise RuntimeError('worker')
signal.signal(signal.SIGCHLD, raise_error)
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, b'1')
    time.sleep(60)
    os._exit(0)
os.read(reader, 1)
ready()
time.sleep(60)
"""
    os.killpg(ranks.start(body, wait_s=60).pid, signal.SIGTERM)
    ((code, stderr),) = ranks.end()
    assert code == 128 + signal.SIGTERM and stderr.startswith("kd-accel: stopped by SIGTERM, ") and "Traceback" not in stderr


def test_process_that_does_not_stop_is_reported(ranks):
    """A training handles the signal, but the main thread is in a call that blocks."""
    process = ranks.start("signal.signal(signal.SIGTERM, lambda *_: None); ready(); block()")
    process.terminate()
    assert process.stderr.readline().startswith("kd-accel: rank 0 of 2 has not stopped within 0 s of the signal: ")
    assert process.poll() is None
    assert "has not stopped" in json.loads(ranks.file(0).read_text())["message"]["message"]


def test_forked_process_has_the_default_handling(ranks):
    """Its signals do not reach the thread of its parent."""
    body = """
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b'1')
    time.sleep(60)
    os._exit(0)
os.read(reader, 1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
time.sleep(0.5)
raise UserError('parent')
"""
    ranks.start(body)
    assert ranks.end() == [(2, "kd-accel: parent\n")]


def test_signals_of_a_single_process_are_not_handled(ranks):
    ranks.start(WAIT, WORLD_SIZE="1").terminate()
    assert ranks.end() == [(-signal.SIGTERM, "")]
