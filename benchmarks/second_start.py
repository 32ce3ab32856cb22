"""Time of a start on data that an earlier start has read: `python -m benchmarks.second_start`.

    samples_N  `kd_accel train` on an image folder of N training JPEGs of 64x48 pixels that are decoded on demand, in one
               process, until its first line of metrics

The first start on each folder is not measured: it reads every file, and keeps digests and colors. The result is the median in
seconds; the notes have the median processor time of a start, which other load does not lengthen. `difference_s` is that of the
largest and the smallest folder. The starts take turns. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import Result, benchmark_parser, finish
from benchmarks.startup import time_until_written
from kd_accel.io.home import VARIABLE as HOME_VARIABLE

_CLASSES = 10
_TEST_SAMPLES = 100


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=3, steps=None, batch_size=32)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 100_000], help="training images of each folder")
    arguments = parser.parse_args()
    numbers = sorted(arguments.samples)
    seconds: dict[str, list[float]] = {f"samples_{number}": [] for number in numbers}
    processor_s: dict[str, list[float]] = {name: [] for name in seconds}
    with tempfile.TemporaryDirectory() as directory:
        os.environ[HOME_VARIABLE] = f"{directory}/home"
        for number in numbers:
            write_photos(Path(directory, str(number)), train=number, test=_TEST_SAMPLES)
        for turn in range(arguments.repeats + 1):
            for number in numbers:
                run_dir = Path(directory, f"run-{number}-{turn}")
                command = train_command(Path(directory, str(number)), run_dir, batch_size=arguments.batch_size)
                used_s = _processor_s()
                elapsed_s = time_until_written(run_dir / "metrics.jsonl", command, threads=arguments.threads)
                if turn > 0:
                    seconds[f"samples_{number}"].append(elapsed_s)
                    processor_s[f"samples_{number}"].append(_processor_s() - used_s)
    notes = {"processor_s": {name: statistics.median(values) for name, values in processor_s.items()}}
    result = Result.of_repeats("second_start", seconds, notes=notes, unit="s")
    least, most = (result.medians[f"samples_{number}"] for number in (numbers[0], numbers[-1]))
    result.notes["difference_s"] = most - least
    print(f"difference of the largest and the smallest folder: {most - least:.2f} s")
    finish(result, threads=arguments.threads)


def _processor_s() -> float:
    """Return the processor time of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def train_command(folder: Path, run_dir: Path, *, batch_size: int) -> list[str]:
    """Return the command of a training of one step whose images are decoded on demand."""
    flags = [f"--data.source=imagefolder:{folder}", "--data.memory_limit_mib=1", "--data.val_fraction=0"]
    flags += [f"--train.batch_size={batch_size}", "--train.max_steps=1", "--train.log_every_steps=1"]
    return [sys.executable, "-m", "kd_accel", "train", f"--run_dir={run_dir}", *flags, "--tracking.wandb=disabled"]


def write_photos(directory: Path, **samples_by_split: int) -> None:
    """Write small JPEGs of random colors at SPLIT/CLASS/NUMBER.jpg, in ten classes."""
    generator = np.random.default_rng(0)
    for split, samples in samples_by_split.items():
        for name in range(_CLASSES):
            (directory / split / str(name)).mkdir(parents=True)
        for sample in range(samples):
            colors = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            path = directory / split / str(sample % _CLASSES) / f"{sample:06}.jpg"
            colors.resize((64, 48), Image.Resampling.BILINEAR).save(path, quality=80)


if __name__ == "__main__":
    main()
