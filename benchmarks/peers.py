"""Same distillation by other programs: `python -m benchmarks.peers`.

Hybrid distillation of ResNet-18 by ResNet-50 (random 32x32 pictures, crop and flip, batches of 128, SGD, Nesterov momentum):
    cached, live        this program, direction `both`, as benchmarks.training has it; the cache exists already
    live_up             this program, live, direction `student_to_teacher`, as torchdistill and common_loop do
    torchdistill        torchdistill 1.1.5 from the package index, in an environment of its own (peer_torchdistill.py)
    common_loop         the loop that most people write (common_loop.py)
    limit               a teacher's forward and a student's step on tensors in memory, nothing else: the limit of `live`

Same images in number and size, threads and batch; the notes have memory format, optimizer and workers of each. The cases take
turns, and torchdistill's interpreter is idle during the turns of the others. Its environment is created at the first run (some
minutes, some GB) and kept; if that fails, its ratios are left out with a message. Run it alone: any other load shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import ALPHA, FEATURE_WEIGHT, LIMITS, TEMPERATURE, limit_case
from benchmarks.common_loop import common_loop_case
from benchmarks.harness import Result, cpu_threads, finish, measure_in_turns, suite_parser
from benchmarks.jobs import CLASSES, IMAGE_SIZE, MEAN, OPTIM, STD, Bench, Size, open_bench
from benchmarks.training_case import Programs

PEER = "torchdistill==1.1.5"
PROGRAMS = {"live": "live_hybrid", "live_up": "live_hybrid_student_to_teacher", "cached": "cached_hybrid"}
RATIOS = [
    ("live", "torchdistill"),
    ("live_up", "torchdistill"),
    ("limit", "torchdistill"),
    ("cached", "torchdistill"),
    ("cached", "common_loop"),
]
_OWN = (
    "contiguous (channels_last on a GPU), the teacher's BatchNorm fused, fused SGD, views of whole batches in the process (or "
    "on the GPU)"
)
_THEIRS = "contiguous, SGD as torch has it, torchvision's transforms per picture in a DataLoader"


class Peer:
    """Process of torchdistill's environment, which runs an epoch at each call of `block`."""

    def __init__(self, python: Path, bench: Bench, *, threads: int, workers: int) -> None:
        sgd = {"lr": OPTIM.lr, "momentum": OPTIM.momentum, "nesterov": True, "weight_decay": OPTIM.weight_decay}
        data = {
            "samples": bench.size.samples,
            "batch_size": bench.size.batch_size,
            "image_size": IMAGE_SIZE,
            "classes": CLASSES,
        }
        loss = {"temperature": TEMPERATURE, "alpha": ALPHA, "feature_weight": FEATURE_WEIGHT}
        settings = {**data, **loss, "sgd": sgd, "mean": MEAN, "std": STD, "threads": threads, "workers": workers}
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
        """Run an epoch. Returns the number of images."""
        assert self._process.stdin is not None
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        return float(self._read()["images"])

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        """Read the next line of JSON; lines that its libraries print are skipped."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{PEER}: ended with code {self._process.wait()}")


def main() -> None:
    parser = suite_parser(__doc__, repeats=3)
    parser.add_argument("--rounds", type=int, default=3, help="how often the students are built from scratch")
    spare = min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    parser.add_argument(
        "--workers",
        type=int,
        default=spare,
        help="of the DataLoaders of torchdistill and common_loop; they need cores of their own",
    )
    environment = Path("runs/benchmarks/torchdistill-env")
    parser.add_argument("--environment", type=Path, default=environment, help="directory of torchdistill's environment")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = open_bench(Size(arguments.batch_size, arguments.steps))
    python = peer_python(arguments.environment)
    rates: dict[str, list[float]] = {}
    about = None
    with tempfile.TemporaryDirectory() as name:
        programs = Programs(bench, Path(name))
        for number in range(arguments.rounds):
            place = Path(name) / str(number)
            cases: dict[str, Callable[[], float]] = {
                case: programs.case(program, place / case, blocks=arguments.repeats + 1) for case, program in PROGRAMS.items()
            }
            cases["common_loop"] = common_loop_case(bench, workers=arguments.workers)
            cases["limit"] = limit_case(LIMITS["limit"], bench)
            peer = Peer(python, bench, threads=arguments.threads, workers=arguments.workers) if python else None
            if peer is not None:
                about, cases["torchdistill"] = peer.about, peer.block
            for case, measured in measure_in_turns(cases, repeats=arguments.repeats).items():
                rates.setdefault(case, []).extend(measured)
            if peer is not None:
                peer.close()
    notes = {"batch_size": arguments.batch_size, "steps_per_block": arguments.steps, "workers": arguments.workers}
    notes |= {"own": _OWN, "theirs": _THEIRS, "torchdistill": about, "direction of the others": "student_to_teacher"}
    result = Result.of_repeats("peers", rates, notes=notes)
    for numerator, denominator in RATIOS:
        if denominator in rates:
            result.add_ratio(numerator, denominator)
    finish(result)


def peer_python(environment: Path) -> Path | None:
    """Return the interpreter of an environment with torchdistill, created if it does not exist; None if that fails."""
    python = environment / "bin" / "python"
    request = [PEER, *(f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision"))]
    try:
        if not python.exists():
            venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *request], check=True, stderr=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"{PEER} is left out: its environment cannot be created ({error})", file=sys.stderr)
        return None
    return python.absolute()


if __name__ == "__main__":
    main()
