"""Gain of a second process: `python -m benchmarks.processes`.

The same plain training of ResNet-18 (digits, global batch 128, float32) through `accelerate launch` as a user starts it:
    one              one process with `--devices` threads
    two_processes    `--devices` processes of one thread each, gradients exchanged over gloo
    bare_one, bare_two    the same split of the loop of bare.py with torch's DistributedDataParallel: the limit
On a machine with GPUs `one` has one GPU and `two_processes` two of them, over NCCL; with one GPU alone nothing is measured, and
the exit code is 0.

Rates are those of the trainings' own lines of metrics, without the first one, which includes the warm-up. The launches take
turns. Run it alone: any other load shows.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks.harness import Result, accelerate_launch, cpu_threads, finish, most_processes, suite_parser
from benchmarks.training import run_cases


def main() -> None:
    parser = suite_parser(__doc__, repeats=4, steps=32, threads=None)
    parser.add_argument("--devices", type=int, default=2, help="CPU threads, or GPUs")
    arguments = parser.parse_args()
    if arguments.devices > (most_processes() or arguments.devices):
        print(f"there are fewer than {arguments.devices} GPUs here: nothing was measured")
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
    """Return the images per second of each line of metrics of a training, without the first."""
    training = ["-m", "kd_accel", "train", "--run_dir", str(run_dir), "--data.source", "digits", "--data.val_fraction", "0"]
    training += ["--train.epochs", "100", "--train.log_every_steps", "4", "--checkpoint.every_epochs", "null"]
    training += ["--tracking.wandb", "disabled", *flags]
    command = [*accelerate_launch(processes), *training]
    done = subprocess.run(command, env=cpu_threads(threads), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["images_per_second"] for line in lines if line["split"] == "train"][1:]


if __name__ == "__main__":
    main()
