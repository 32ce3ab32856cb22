"""The same distillation with kd_accel, torchdistill and plain PyTorch: `python -m benchmarks.peers`.

Hybrid distillation of ResNet-50 into ResNet-18 (random 32x32 images, crop and flip, batches of 128, SGD with Nesterov):
    cached, live        kd_accel with direction `both`, as in benchmarks.training; the cache is complete
    live_up             kd_accel, live, with direction `student_to_teacher`, the direction of torchdistill and common_loop
    torchdistill        torchdistill 1.1.5 from PyPI, in a virtual environment (peer_torchdistill.py)
    common_loop         a typical distillation loop in plain PyTorch (common_loop.py)
    limit               the teacher's forward and the student's step on tensors in memory, the limit of `live`

All cases have the same number and size of images, threads and batch size; the notes have the memory format, optimizer and
workers of each. The result is images/s; the cases take turns, and torchdistill's process is idle during the turns of all other
cases. Its environment is created by the first run (minutes, gigabytes) and kept. If it cannot be created, a message is printed
and the ratios with torchdistill are omitted. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import ALPHA, FEATURE_WEIGHT, TEMPERATURE
from benchmarks.common_loop import common_loop_case
from benchmarks.harness import Result, benchmark_parser, cpu_threads, finish, measure_in_turns
from benchmarks.jobs import CLASSES, IMAGE_SIZE, MEAN, SGD, STD, Bench, Size, open_bench
from benchmarks.training_case import CaseBuilder

PEER = "torchdistill==1.1.5"
CASES = {
    "live": "live_hybrid",
    "live_up": "live_hybrid_student_to_teacher",
    "cached": "cached_hybrid",
    "limit": "limit",
}
"""{case: its name in training_case.py}."""
RATIOS = [
    ("live", "torchdistill"),
    ("live_up", "torchdistill"),
    ("limit", "torchdistill"),
    ("cached", "torchdistill"),
    ("cached", "common_loop"),
]
_KD_ACCEL = (
    "contiguous (channels_last on a GPU), the teacher's BatchNorm fused, fused SGD, views of a batch at once in the training "
    "process (or on the GPU)"
)
_PEERS = "contiguous, default SGD, torchvision transforms per image in a DataLoader, direction student_to_teacher"


class Peer:
    """Process that runs torchdistill in its environment.

    Attributes:
        about: Versions, and the loss after the first epoch.
    """

    def __init__(self, python: Path, bench: Bench, *, threads: int, workers: int) -> None:
        data = {
            "samples": bench.size.samples,
            "batch_size": bench.size.batch_size,
            "image_size": IMAGE_SIZE,
            "classes": CLASSES,
        }
        loss = {"temperature": TEMPERATURE, "alpha": ALPHA, "feature_weight": FEATURE_WEIGHT}
        settings = {**data, **loss, "sgd": SGD, "mean": MEAN, "std": STD, "threads": threads, "workers": workers}
        script = Path(__file__).with_name("peer_torchdistill.py")
        self._process = subprocess.Popen(
            [python, script, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=cpu_threads(threads),
        )
        self.about = self._read()

    def block(self) -> float:
        """Run an epoch and return the number of images."""
        assert self._process.stdin is not None
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        return float(self._read()["images"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        """Read the next line of JSON, and skip lines that libraries print."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{PEER}: the process ended with exit code {self._process.wait()}")


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=3)
    parser.add_argument("--rounds", type=int, default=3, help="number of times that all cases are built (default: 3)")
    # Workers need free cores, which a machine with a GPU has and the CPU benchmarks do not.
    workers = min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    text = f"DataLoader workers of torchdistill and common_loop (default: {workers})"
    parser.add_argument("--workers", type=int, default=workers, help=text)
    environment = Path("runs/benchmarks/torchdistill-env")
    parser.add_argument("--environment", type=Path, default=environment, help="virtual environment of torchdistill")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = open_bench(Size(arguments.batch_size, arguments.steps))
    python = peer_python(arguments.environment)
    rates: dict[str, list[float]] = {}
    about = None
    with tempfile.TemporaryDirectory() as temporary:
        builder = CaseBuilder(bench, Path(temporary))
        for number in range(arguments.rounds):
            directory = Path(temporary) / str(number)
            blocks = arguments.repeats + 1
            cases = {case: builder.case(name, directory / case, blocks=blocks) for case, name in CASES.items()}
            cases["common_loop"] = common_loop_case(bench, workers=arguments.workers)
            peer = Peer(python, bench, threads=arguments.threads, workers=arguments.workers) if python else None
            if peer is not None:
                about, cases["torchdistill"] = peer.about, peer.block
            for case, measured in measure_in_turns(cases, repeats=arguments.repeats).items():
                rates.setdefault(case, []).extend(measured)
            if peer is not None:
                peer.close()
    notes = {"batch_size": arguments.batch_size, "steps_per_block": arguments.steps, "workers": arguments.workers}
    notes |= {"kd_accel": _KD_ACCEL, "peers": _PEERS, "torchdistill": about}
    result = Result.of_repeats("peers", rates, notes=notes)
    for numerator, denominator in RATIOS:
        if denominator in rates:
            result.add_ratio(numerator, denominator)
    finish(result)


def peer_python(environment: Path) -> Path | None:
    """Return the interpreter of the environment, which is created if it does not exist; None if that is not possible."""
    python = environment / "bin" / "python"
    packages = [PEER, *(f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision"))]
    try:
        if not python.exists():
            venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stderr=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"{PEER} is omitted: its virtual environment cannot be created ({error})", file=sys.stderr)
        return None
    return python.absolute()


if __name__ == "__main__":
    main()
