"""Time from `accelerate launch` to the end of the first step: `python -m benchmarks.startup`.

    program    `kd_accel train` with a student (ResNet-18) on the digits, until its first line of metrics
    libraries  a script that does the same with torch, torchvision, scikit-learn and Accelerate alone (startup_bare.py): the
               time of the launcher and the libraries

The result is the median in seconds; `own_s` in the notes is the difference of the two, the time of kd_accel itself. The
launches take turns. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.harness import Result, accelerate_launch, benchmark_parser, cpu_threads, finish, most_processes
from benchmarks.startup_bare import FIRST_STEP

_POLL_S = 0.005


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=5, steps=None)
    processes = min(2, most_processes() or 2)
    parser.add_argument("--processes", type=int, default=processes, help=f"processes of a launch (default: {processes})")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"program": [], "libraries": []}
    launcher, batch_size = accelerate_launch(arguments.processes), str(arguments.batch_size)
    for turn in range(arguments.repeats + 1):
        with tempfile.TemporaryDirectory() as directory:
            run_dir, first_step = Path(directory) / "run", Path(directory) / FIRST_STEP
            program = ["kd_accel", "train", f"--run_dir={run_dir}", f"--train.batch_size={batch_size}"]
            program += ["--train.log_every_steps=1", "--tracking.wandb=disabled"]
            cases = {
                "program": (program, run_dir / "metrics.jsonl"),
                "libraries": (["benchmarks.startup_bare", batch_size, str(first_step)], first_step),
            }
            for name, (module, file) in cases.items():
                elapsed_s = time_until_written(file, [*launcher, "-m", *module], threads=arguments.threads)
                # The first turn only warms the page cache.
                if turn > 0:
                    seconds[name].append(elapsed_s)
    notes = {"processes": arguments.processes, "batch_size": arguments.batch_size}
    result = Result.of_repeats("startup", seconds, notes=notes, unit="s")
    result.notes["own_s"] = statistics.median(seconds["program"]) - statistics.median(seconds["libraries"])
    print(f"time of kd_accel itself (median of program - median of libraries): {result.notes['own_s']:.2f} s")
    finish(result, threads=arguments.threads)


def time_until_written(file: Path, command: list[str], *, threads: int) -> float:
    """Run a command until a file is not empty, then end its process group; return the time in seconds."""
    started_at = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=cpu_threads(threads),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not (file.is_file() and file.stat().st_size):
            if process.poll() is not None and not file.is_file():
                assert process.stderr is not None
                raise SystemExit(process.stderr.read()[-4000:])
            time.sleep(_POLL_S)
        return time.perf_counter() - started_at
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate()


if __name__ == "__main__":
    main()
