"""Trainings on two nodes with a launcher each, and their end when a process, a node or the network between the nodes fails."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.holding import Hold
from tests.support.launching import (
    LAUNCH,
    ROOT,
    SMALL,
    environment,
    free_port,
    kill_all,
    last_lines,
    losses,
    metrics,
    ranks_of,
    start,
    summary,
    train,
)
from tests.support.resuming import assert_same_run

pytestmark = pytest.mark.slow

TIMEOUT_S = 10
"""Time until a peer that does not respond counts as lost. It must exceed the lead of a process over a slower one."""

STEADY = [
    "--model.arch=import:tests.support.models:student_with_everything",
    "--train.epochs=10",
    "--checkpoint.every_steps=10",
    "--checkpoint.every_epochs=null",
]
"""Eighty steps."""

HELD_AT = 25


def node(rank, run_dir, *flags, port, address="127.0.0.1", namespace=None, hold=None, **changes):
    argv = [
        *LAUNCH,
        *("--config_file", "launch/multinode.yaml", "--num_machines", "2", "--num_processes", "2"),
        *("--machine_rank", str(rank), "--main_process_ip", address, "--main_process_port", str(port)),
        *(["-m", "tests.support.patched_program", "holds"] if hold else ["-m", "kd_accel"]),
        *("train", f"--run_dir={run_dir}", *SMALL, *flags),
    ]
    return subprocess.Popen(
        [*(["ip", "netns", "exec", namespace] if namespace else []), *argv],
        cwd=ROOT,
        env=environment(**changes, **(hold.environment if hold else {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def both(run_dir, *flags, hold=None):
    port = free_port()
    return [node(rank, run_dir, *flags, port=port, hold=hold) for rank in (0, 1)]


def finish(nodes):
    with ended(nodes):
        outputs = [each.communicate(timeout=240)[0] for each in nodes]
        assert [each.returncode for each in nodes] == [0, 0], "\n".join(outputs)


@contextlib.contextmanager
def ended(nodes):
    """Kill the processes of the nodes at the end of the `with` block, and those of the list that it yields."""
    everybody = []
    try:
        yield everybody
    finally:
        for process in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for each in nodes:
            kill_all(each)


def processes_of(nodes):
    launchers = [psutil.Process(each.pid) for each in nodes]
    return [process for launcher in launchers for process in (launcher, *launcher.children(recursive=True))]


def assert_lost(output, rank):
    """Check that a rank has reported once that its peers are lost, and that its launcher ends with this report."""
    text = f"rank {rank} of 2 has lost its peers after step {HELD_AT} ("
    assert output.count(f"kd-accel: {text}") == 1, output
    report = last_lines(output)
    assert text in report and "run the same command again to resume" in report, output
    assert "kd_accel/training" not in output


def test_two_nodes_train_what_one_process_does(tmp_path):
    finish(both(tmp_path / "run"))
    assert summary(tmp_path / "run")["world_size"] == 2
    train(tmp_path / "one")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_each_launcher_ends_with_a_wrong_setting(tmp_path):
    nodes = both(tmp_path / "run", "--train.epoch=3")
    text = "--train.epoch: no such setting; did you mean --train.epochs?"
    with ended(nodes):
        outputs = [each.communicate(timeout=240)[0] for each in nodes]
    for output in outputs:
        assert output.count(f"kd-accel: {text}") == 1 and last_lines(output).splitlines()[-2] == f"  {text}", output


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(run_dir, *STEADY, processes=2)
    return run_dir


@pytest.mark.proof
@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.faults)])
def test_a_node_that_dies_ends_its_peer_and_the_next_start_resumes(tmp_path, fault_record, straight, dead):
    """Node 0 holds the store through which the processes have found each other."""
    hold = Hold(tmp_path / "hold", step=HELD_AT)
    nodes = both(tmp_path / "run", *STEADY, hold=hold)
    with fault_record.trial("a node dies"):
        with ended(nodes) as everybody:
            hold.wait_for_ranks(*nodes)
            everybody += processes_of(nodes)
            for process in reversed(processes_of([nodes[dead]])):
                process.kill()
            hold.release()
            output, _ = nodes[1 - dead].communicate(timeout=240)
            assert nodes[1 - dead].returncode not in (0, None)
            assert_lost(output, 1 - dead)
            assert not psutil.wait_procs(everybody, timeout=60)[1]
        finish(both(tmp_path / "run", *STEADY))
        assert_same_run(straight, tmp_path / "run")


def test_a_process_that_never_comes(tmp_path):
    """A peer that was launched does not join."""
    alone = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = train(tmp_path / "run", "--train.timeout_s=3", code=2, **alone)
    assert "the processes could not connect" in done.stderr and "start a launcher on every node" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_wrong_network_interface_is_refused(tmp_path):
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = train(tmp_path / "run", code=2, GLOO_SOCKET_IFNAME="nowhere0", **alone)
    assert "Unable to find" in done.stderr and "set GLOO_SOCKET_IFNAME" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_process_that_hangs_ends_the_others(tmp_path, fault_record, straight):
    hold = Hold(tmp_path / "hold", step=HELD_AT)
    flags = [*SMALL, *STEADY, f"--train.timeout_s={TIMEOUT_S}"]
    process = start("train", f"--run_dir={tmp_path / 'run'}", *flags, processes=2, patch="holds", **hold.environment)
    with fault_record.trial("a process hangs"):
        with ended([process]) as everybody:
            hold.wait_for_ranks(process)
            everybody += processes_of([process])
            ranks_of(process)[1].send_signal(signal.SIGSTOP)
            hold.release()
            _, output = process.communicate(timeout=240)  # the launcher kills the process 30 s after SIGTERM
            assert process.returncode != 0
            assert_lost(output, 0)
            assert not psutil.wait_procs(everybody, timeout=60)[1]
        train(tmp_path / "run", *STEADY, processes=2)
        assert_same_run(straight, tmp_path / "run")


@pytest.fixture
def network(tmp_path):
    """Create two network namespaces and a link: (names, addresses, function that sets the link's state to up or down)."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"kd{os.getpid()}a", f"kd{os.getpid()}b"]
    addresses = ["10.231.7.1", "10.231.7.2"]

    def ip(*arguments, check=True):
        return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)

    def cable(state):
        ip("-n", names[1], "link", "set", "veth1", state)

    if ip("netns", "add", names[0], check=False).returncode:
        pytest.skip("network namespaces are not permitted here")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1])
        for index, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{addresses[index]}/24", "dev", f"veth{index}")
            for device in ("lo", f"veth{index}"):
                ip("-n", name, "link", "set", device, "up")
        yield names, addresses, cable
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


@pytest.mark.faults
def test_a_network_that_is_cut(tmp_path, fault_record, straight, network):
    """Both nodes end within the timeout, and resume when the network is back."""
    names, addresses, cable = network

    def nodes(*flags, hold=None):
        return [
            node(
                rank,
                tmp_path / "run",
                *STEADY,
                *flags,
                port=29622,
                address=addresses[0],
                namespace=names[rank],
                hold=hold,
                GLOO_SOCKET_IFNAME=f"veth{rank}",
            )
            for rank in (0, 1)
        ]

    hold = Hold(tmp_path / "hold", step=HELD_AT)
    with fault_record.trial("the network between two nodes is cut"):
        first = nodes(f"--train.timeout_s={TIMEOUT_S}", hold=hold)
        with ended(first) as everybody:
            hold.wait_for_ranks(*first)
            everybody += processes_of(first)
            cable("down")
            hold.release()
            cut_at = time.monotonic()
            outputs = [each.communicate(timeout=240)[0] for each in first]
            print(f"both nodes had ended {time.monotonic() - cut_at:.1f} s after the cut", file=sys.stderr)
            assert all(each.returncode not in (0, None) for each in first)
            for rank, output in enumerate(outputs):
                assert_lost(output, rank)
            assert not psutil.wait_procs(everybody, timeout=60)[1]
        cable("up")
        finish(nodes())
        assert_same_run(straight, tmp_path / "run")
    assert len(metrics(tmp_path / "run", "train")) == 80
