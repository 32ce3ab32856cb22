"""Time from the launch to the end of the first step: `python -m benchmarks.startup`.

    program    `accelerate launch -m kd_accel train`, a student (ResNet-18) on the digits, until its first line of metrics
    libraries  a script that is launched in the same way and does the same with torch, torchvision, scikit-learn and
               Accelerate alone (startup_bare.py): the cost of libraries and launcher

Medians are seconds; `own` is the difference of the two. The launches take turns. Run it alone: any other load shows.
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

from benchmarks.harness import Result, accelerate_launch, cpu_threads, finish, most_processes, suite_parser
from benchmarks.startup_bare import FIRST_STEP

_POLL_S = 0.005


def main() -> None:
    parser = suite_parser(__doc__, repeats=5, steps=None)
    processes = min(2, most_processes() or 2)
    parser.add_argument("--processes", type=int, default=processes, help="of each launch, with --threads threads each")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"program": [], "libraries": []}
    launcher, size = accelerate_launch(arguments.processes), f"{arguments.batch_size}"
    for turn in range(arguments.repeats + 1):
        with tempfile.TemporaryDirectory() as directory:
            run_dir, first_step = Path(directory) / "run", Path(directory) / FIRST_STEP
            program = ["kd_accel", "train", f"--run_dir={run_dir}", f"--train.batch_size={size}"]
            program += ["--train.log_every_steps=1", "--tracking.wandb=disabled"]
            cases = {
                "program": (program, run_dir / "metrics.jsonl"),
                "libraries": (["benchmarks.startup_bare", size, str(first_step)], first_step),
            }
            for name, (module, sign) in cases.items():
                taken_s = time_until(sign, [*launcher, "-m", *module], threads=arguments.threads)
                if turn:  # the first one warms the page cache
                    seconds[name].append(taken_s)
    notes = {"processes": arguments.processes, "batch_size": arguments.batch_size}
    result = Result.of_repeats("startup", seconds, notes=notes, unit="s")
    result.notes["own_s"] = statistics.median(seconds["program"]) - statistics.median(seconds["libraries"])
    print(f"own share {result.notes['own_s']:.2f} s")
    finish(result, threads=arguments.threads)


def time_until(sign: Path, command: list[str], *, threads: int) -> float:
    """Return the seconds until the file `sign` is not empty; then end the launch, with all that it started."""
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
        while not (sign.is_file() and sign.stat().st_size):
            if process.poll() is not None and not sign.is_file():
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
