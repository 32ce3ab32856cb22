"""Two nodes with a launcher each, and the end of a training when one of them, or the network between them, fails."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.launching import LAUNCH, ROOT, SMALL, environment, free_port, losses, metrics, start, summary, train
from tests.support.resuming import assert_same_run

pytestmark = pytest.mark.slow

TIMEOUT_S = 10
STEADY = [
    "--model.arch=import:tests.support.models:student_with_everything",
    "--train.epochs=50",
    "--checkpoint.every_steps=10",
    "--checkpoint.every_epochs=null",
    f"--train.timeout_s={TIMEOUT_S}",
]
"""Four hundred steps: some seconds, in which a failure can be placed."""


def node(rank, run_dir, *flags, port, address="127.0.0.1", namespace=None, **changes):
    argv = [
        *LAUNCH,
        *("--config_file", "launch/multinode.yaml", "--num_machines", "2", "--num_processes", "2"),
        *("--machine_rank", str(rank), "--main_process_ip", address, "--main_process_port", str(port)),
        *("-m", "kd_accel", "train", f"--run_dir={run_dir}", *SMALL, *flags),
    ]
    return subprocess.Popen(
        [*(["ip", "netns", "exec", namespace] if namespace else []), *argv],
        cwd=ROOT,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def both(run_dir, *flags):
    port = free_port()
    return [node(rank, run_dir, *flags, port=port) for rank in (0, 1)]


def finish(nodes):
    outputs = [each.communicate(timeout=240)[0] for each in nodes]
    assert [each.returncode for each in nodes] == [0, 0], outputs


def wait_for_step(process, step):
    """Wait until the process that prints progress has done a step."""
    said = []
    while f"step {step}/" not in (said[-1] if said else ""):
        said.append(process.stdout.readline())
        assert process.poll() is None, "".join(said)


@contextlib.contextmanager
def ended(nodes):
    """Kill all processes of the nodes at the end of the `with` block; yields the processes."""
    everybody = [
        child for each in nodes for child in [psutil.Process(each.pid), *psutil.Process(each.pid).children(recursive=True)]
    ]
    try:
        yield everybody
    finally:
        for process in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for each in nodes:
            each.wait()


def test_two_nodes_train_what_one_process_does(tmp_path):
    finish(both(tmp_path / "run"))
    assert summary(tmp_path / "run")["world_size"] == 2
    train(tmp_path / "one")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    train(run_dir, *STEADY, processes=2)
    return run_dir


def test_a_node_that_dies_ends_its_peer_and_the_next_start_resumes(tmp_path, fault_record, straight):
    nodes = both(tmp_path / "run", *STEADY)
    with fault_record.trial("a node dies"):
        wait_for_step(nodes[0], 25)
        with ended(nodes) as everybody:
            for process in [*psutil.Process(nodes[1].pid).children(recursive=True), psutil.Process(nodes[1].pid)]:
                process.kill()
            said, _ = nodes[0].communicate(timeout=TIMEOUT_S + 30)
            assert nodes[0].returncode not in (0, None)
            assert said.count("kd-accel: rank 0 of 2 has lost its peers after step ") == 1, said
            assert "run the same command again to resume" in said and "kd_accel/training" not in said
            assert not psutil.wait_procs(everybody, timeout=10)[1]
        finish(both(tmp_path / "run", *STEADY))
        assert_same_run(straight, tmp_path / "run")


def test_a_process_that_never_comes(tmp_path):
    """The launchers join first; this is a process whose peers were started and never joined."""
    alone = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = train(tmp_path / "run", "--train.timeout_s=3", code=2, **alone)
    assert "the processes could not connect" in done.stderr and "start a launcher on every node" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.faults
def test_a_process_that_hangs_ends_the_others(tmp_path, fault_record, straight):
    process = start("train", f"--run_dir={tmp_path / 'run'}", *SMALL, *STEADY, processes=2)
    with fault_record.trial("a process hangs"), ended([process]):
        wait_for_step(process, 25)
        ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "RANK" in child.environ()]
        next(child for child in ranks if child.environ()["RANK"] == "1").send_signal(signal.SIGSTOP)
        _, said = process.communicate(timeout=TIMEOUT_S + 60)  # the launcher gives it 30 s to obey
        assert process.returncode != 0
        assert said.count("kd-accel: rank 0 of 2 has lost its peers after step ") == 1, said
        assert not psutil.wait_procs(ranks, timeout=10)[1]
        train(tmp_path / "run", *STEADY, processes=2)
        assert_same_run(straight, tmp_path / "run")


@pytest.fixture
def network(tmp_path):
    """Two network namespaces with an address each, and a link between them: (names, addresses, function to set its state)."""
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
    """No packet reaches either side; both end within the timeout, and resume when the network is back."""
    names, addresses, cable = network

    def nodes():
        return [
            node(
                rank,
                tmp_path / "run",
                *STEADY,
                port=29622,
                address=addresses[0],
                namespace=names[rank],
                GLOO_SOCKET_IFNAME=f"veth{rank}",
            )
            for rank in (0, 1)
        ]

    with fault_record.trial("the network between two nodes is cut"):
        first = nodes()
        wait_for_step(first[0], 25)
        with ended(first) as everybody:
            cable("down")
            cut_at = time.monotonic()
            outputs = [each.communicate(timeout=120)[0] for each in first]
            print(f"both nodes had ended {time.monotonic() - cut_at:.1f} s after the cut", file=sys.stderr)
            assert all(each.returncode not in (0, None) for each in first)
            for rank, said in enumerate(outputs):
                assert said.count(f"kd-accel: rank {rank} of 2 has lost its peers after step ") == 1, said
            assert not psutil.wait_procs(everybody, timeout=10)[1]
        cable("up")
        finish(nodes())
        assert_same_run(straight, tmp_path / "run")
    assert len(metrics(tmp_path / "run", "train")) == 400
