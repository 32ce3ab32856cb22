"""Launch files: keys that Accelerate accepts, valid commands in the headers, and the Slurm script."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "launch").glob("*.yaml"))
PROCESSES = {"cpu2": 2, "gpu1": 1, "gpu8": 8, "multinode": 16}


def header(path):
    """Return the comments of a file as one line."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#") and not line.startswith(("#!", "#SBATCH"))]
    return " ".join(line.removeprefix("#").strip().removesuffix("\\") for line in lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_accepts_every_key(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[path.stem]
    assert config.mixed_precision == "no" and not config.use_cpu


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_header_names_the_file_and_an_existing_config(path):
    text = header(path)
    assert f"accelerate launch --config_file launch/{path.name} " in text
    (config,) = re.findall(r"--config (\S+)", text)
    assert (ROOT / config).is_file()


def test_readme_lists_every_file():
    text = (ROOT / "launch/README.md").read_text()
    files = {path.name for path in (ROOT / "launch").iterdir()} - {"README.md"}
    assert set(re.findall(r"^\| `(\S+)`", text, flags=re.M)) == files


def write_script(path, text):
    """Write an executable shell script that replaces a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_slurm_script_starts_a_launcher_on_every_node(tmp_path):
    """Replace Slurm and the launcher by scripts, and compare the arguments of the launcher of each node."""
    write_script(tmp_path / "bin/scontrol", "printf 'node7\\nnode8\\n'")
    write_script(
        tmp_path / "bin/srun",
        'while [[ $1 == --* ]]; do shift; done\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done',
    )
    write_script(tmp_path / ".venv/bin/accelerate", 'printf "%s|" "$@"; echo')
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm.sbatch", "my config.yaml", "--optim.lr", "0.2"],
        cwd=tmp_path,
        env={**slurm, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    nodes = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    for rank, arguments in enumerate(nodes):
        flags = dict(zip(arguments[1:-7:2], arguments[2:-7:2], strict=True))
        assert flags == {
            "--config_file": "launch/multinode.yaml",
            "--num_machines": "2",
            "--num_processes": "16",
            "--machine_rank": str(rank),
            "--main_process_ip": "node7",
            "--main_process_port": "29500",
        }
        assert arguments[-7:] == ["-m", "kd_accel", "train", "--config", "my config.yaml", "--optim.lr", "0.2"]
    assert len(nodes) == 2


def test_the_slurm_script_ends_its_tasks_and_requeues_before_its_time_is_over(tmp_path):
    """After SIGUSR1 the script sends SIGTERM to srun, and requeues the job when srun has ended."""
    write_script(tmp_path / "bin/scontrol", 'case $1 in show) echo node7;; *) echo "$@" >> calls;; esac')
    write_script(
        tmp_path / "bin/srun",
        "trap 'sleep 0.3; echo stopped >> calls; exit 143' TERM\necho started >> calls\nwhile :; do sleep 0.05; done",
    )
    slurm = {"SLURM_JOB_NODELIST": "node7", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}
    process = subprocess.Popen(
        ["bash", ROOT / "launch/slurm.sbatch", "config.yaml"],
        cwd=tmp_path,
        env={**slurm, "SLURM_JOB_ID": "77", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "calls").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "calls").read_text().split("\n")[:-1] == ["started", "stopped", "requeue 77"]


def test_slurm_script_requires_a_config(tmp_path):
    done = subprocess.run(["bash", ROOT / "launch/slurm.sbatch"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "usage: sbatch launch/slurm.sbatch CONFIG" in done.stderr
