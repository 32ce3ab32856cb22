"""Processes of the program; several of them are started by `accelerate launch`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.warm import WarmProcess

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]

SMALL = [
    "--data.source=import:tests.support.models:images",
    "--data.transform=crop_flip",
    "--data.val_fraction=0.2",
    "--model.arch=import:tests.support.models:student",
    "--optim.lr=0.05",
    "--train.batch_size=16",
    "--train.epochs=3",
    "--train.log_every_steps=1",
    "--tracking.wandb=disabled",
]
"""Flags of a training of 24 steps in three epochs, which takes a second.

It has 128 training samples, 32 validation samples and 41 test samples.
"""


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def command(*argv, processes=1, launch_file="launch/cpu2.yaml", patch=None):
    """Return a command line. patch: Name of a patch of tests/support/patched_program.py."""
    module = ["kd_accel"] if patch is None else ["tests.support.patched_program", patch]
    program = ["-m", *module, *map(str, argv)]
    if processes == 1:
        return [sys.executable, *program]
    return [*LAUNCH, "--config_file", launch_file, "--num_processes", str(processes), *program]


def start(*argv, processes=1, quiet=False, patch=None, **environment_changes):
    """Start a process with text streams: several through the launcher, one forked from a warm interpreter unless patched."""
    if processes == 1 and patch is None:
        return WarmProcess(argv, env=environment(**environment_changes), quiet=quiet)
    stream = subprocess.DEVNULL if quiet else subprocess.PIPE
    return subprocess.Popen(
        command(*argv, processes=processes, patch=patch),
        cwd=ROOT,
        env=environment(**environment_changes),
        stdout=stream,
        stderr=stream,
        text=True,
    )


def run(*argv, processes=1, code=0, **environment_changes):
    """Run the program to its end. code: Expected exit code; None accepts any failure."""
    process = start(*argv, processes=processes, **environment_changes)
    try:
        stdout, stderr = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            kill_all(process)
    done = subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)
    is_expected = done.returncode == code if code is not None else done.returncode != 0
    assert is_expected, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def train(run_dir, *flags, processes=1, code=0, **environment_changes):
    return run("train", f"--run_dir={run_dir}", *SMALL, *flags, processes=processes, code=code, **environment_changes)


def python(*argv, launcher=(), cwd=ROOT):
    """Run a Python program other than kd-accel, which must succeed. launcher: Command that starts it in several processes."""
    command_line = [*(launcher or [sys.executable]), *map(str, argv)]
    settings = {"cwd": cwd, "env": environment(PYTHONPATH=str(ROOT)), "capture_output": True, "text": True}
    done = subprocess.run(command_line, timeout=300, check=False, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def kill_all(process):
    """Kill a process and all its descendants, unless it has ended. A launcher's workers have sessions of their own."""
    everybody = []
    if process.poll() is None:  # else its id may be that of another process
        with contextlib.suppress(psutil.NoSuchProcess):
            everybody = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(everybody, timeout=30)


def metrics(run_dir, split=None):
    """Return the lines of metrics.jsonl, without the numbers that depend on the machine's speed."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None)
    return [line for line in lines if split in (None, line["split"])]


def summary(run_dir):
    content = json.loads((Path(run_dir) / "summary.json").read_text())
    return {key: value for key, value in content.items() if key not in ("seconds", "images_per_second")}


def losses(run_dir):
    return [line["loss"] for line in metrics(run_dir, "train")]


def ranks_of(launcher):
    """Return the running processes of a launcher by rank."""
    alive = [
        child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "RANK" in child.environ()
    ]
    return {int(child.environ()["RANK"]): child for child in reversed(alive)}


def last_lines(output):
    """Return the last 15 lines of a launcher's output: the end of its summary."""
    lines = output.rstrip().splitlines()
    assert "Root Cause (first observed failure):" in lines and set(lines[-1]) == {"="}, output
    return "\n".join(lines[-15:])


def check_message(done, *parts):
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("kd-accel: ")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def last_line(tmp_path, module, *flags):
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT), TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
