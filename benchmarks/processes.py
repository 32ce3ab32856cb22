"""Speedup by a second process: `python -m benchmarks.processes`.

The same training of ResNet-18 on labels alone (digits, global batch 128, float32), started by `accelerate launch`:
    one                   one process with `--devices` threads
    two_processes         `--devices` processes with one thread each; gradients are averaged over gloo
    bare_one, bare_two    the loop of bare.py with the same processes and DistributedDataParallel, the limit
With GPUs `one` uses one GPU and `two_processes` two GPUs over NCCL. With fewer GPUs nothing is measured, with exit code 0.

The result is images/s from the lines of metrics of each training, without the first line, which includes the warm-up. The
launches take turns. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from benchmarks.harness import Result, accelerate_launch, benchmark_parser, cpu_threads, finish, most_processes, training_rates
from benchmarks.training import run_cases


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=4, steps=32, threads=None)
    parser.add_argument("--devices", type=int, default=2, help="CPU threads, or GPUs (default: 2)")
    arguments = parser.parse_args()
    if arguments.devices > (most_processes() or arguments.devices):
        print(f"fewer than {arguments.devices} GPUs were found; nothing was measured")
        return
    rates: dict[str, list[float]] = {"one": [], "two_processes": [], "bare_one": [], "bare_two": []}
    numbers = {"batch_size": arguments.batch_size, "steps": 8, "repeats": 3, "rounds": 1}
    with tempfile.TemporaryDirectory() as directory:
        for number in range(arguments.repeats):
            for name, bare, processes in (("one", "bare_one", 1), ("two_processes", "bare_two", arguments.devices)):
                flags = ["--train.batch_size", str(arguments.batch_size), "--train.max_steps", str(arguments.steps)]
                run_dir = Path(directory) / f"{name}-{number}"
                threads = arguments.devices // processes
                rates[name] += launched_rates(run_dir, flags, processes=processes, threads=threads)
                rates[bare] += run_cases(["bare"], processes, threads=threads, **numbers)["rates"]["bare"]
    notes = {"batch_size": arguments.batch_size, "steps": arguments.steps, "devices": arguments.devices}
    result = Result.of_repeats("processes", rates, notes=notes)
    result.add_ratio("two_processes", "one")
    result.add_ratio("bare_two", "bare_one")
    finish(result, threads=arguments.devices)


def launched_rates(run_dir: Path, flags: list[str], *, processes: int, threads: int) -> list[float]:
    """Launch a training, and return images/s of each of its lines of metrics without the first."""
    training = ["-m", "kd_accel", "train", "--run_dir", str(run_dir), "--data.source", "digits", "--data.val_fraction", "0"]
    training += ["--train.epochs", "100", "--train.log_every_steps", "4", "--checkpoint.every_epochs", "null"]
    training += ["--tracking.wandb", "disabled", *flags]
    command = [*accelerate_launch(processes), *training]
    done = subprocess.run(command, env=cpu_threads(threads), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return training_rates(run_dir)[1:]


if __name__ == "__main__":
    main()
