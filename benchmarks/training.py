"""Cost of a training step next to a bare PyTorch loop, and of distillation with a cache.

    python -m benchmarks.training                    all cases, in one process and in two
    python -m benchmarks.training --suite quick      in one process: plain / bare
    python -m benchmarks.training --suite cached     in one: cached_logits / plain, cached_hybrid / plain, live_hybrid / limit,
                                                     and the cost of the feature term by itself

All cases train the same student (see jobs.py) with fused SGD and Nesterov momentum. Those of this program run its complete
path: order of the samples, views (crop_flip), loading, normalization, teacher, loss, metrics, learning rate, the line of
metrics at the end of a block. `cached_...` read a real cache, with another view in each block, so a block includes the opening
of that view, which a training does once in an epoch of hundreds of steps. Hybrids have direction `both` unless another is
named. `bare` and `limit...` (bare.py) do nothing but forward, backward and step on normalized tensors in memory; `limit` has a
live teacher and the feature term, `limit_cached_hybrid` has the teacher's outputs in memory.

One unit is an image; a block is an epoch of a few steps; the cases take turns. In each round all students are built from
scratch: the addresses of their weights in memory make up to 3 % of a step. Two processes share the batch, each with `--threads`
threads, through `accelerate launch`; their cases end in `@2`. The notes hold, for each case of the program, the share of each
part of a step, from one more block under torch.profiler. Run it alone: on two cores any other load shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Result, accelerate_launch, cpu_threads, finish, most_processes, suite_parser

RATIOS = {
    "quick": [("plain", "bare")],
    "cached": [
        ("cached_logits", "plain"),
        ("cached_hybrid", "plain"),
        ("live_hybrid", "limit"),
        ("limit_cached_hybrid", "limit_cached_logits"),
    ],
    "all": [
        ("plain", "bare"),
        ("cached_logits", "plain"),
        ("cached_hybrid", "plain"),
        ("live_hybrid", "limit"),
        ("live_logits", "limit_live_logits"),
        ("cached_logits", "limit_cached_logits"),
        ("cached_hybrid", "limit_cached_hybrid"),
        ("limit_cached_hybrid", "limit_cached_logits"),
        ("cached_hybrid_student_to_teacher", "plain"),
        ("cached_hybrid_teacher_to_student", "plain"),
        ("live_hybrid_student_to_teacher", "live_hybrid"),
        ("live_hybrid_teacher_to_student", "live_hybrid"),
    ],
}
NUMBERS = ("batch_size", "steps", "threads", "repeats", "rounds")
PROCESSES = {"quick": [1], "cached": [1], "all": [1, 2]}


def main() -> None:
    parser = suite_parser(__doc__, repeats=9, steps=4)
    parser.add_argument("--suite", choices=list(RATIOS), default="all")
    parser.add_argument("--rounds", type=int, default=3, help="how often the students are built from scratch")
    parser.add_argument(
        "--processes", type=int, nargs="+", help="one number after the other; default: the suite's, if the GPUs allow"
    )
    arguments = parser.parse_args()
    cases = list(dict.fromkeys(case for ratio in RATIOS[arguments.suite] for case in ratio))
    rates: dict[str, list[float]] = {}
    shares: dict[str, dict[str, float]] = {}
    ratios = []
    possible = [number for number in PROCESSES[arguments.suite] if number <= (most_processes() or number)]
    for processes in arguments.processes or possible:
        suffix = f"@{processes}" if processes > 1 else ""
        found = run_cases(cases, processes, **{name: getattr(arguments, name) for name in NUMBERS})
        rates |= {name + suffix: measured for name, measured in found["rates"].items()}
        shares |= {name + suffix: share for name, share in found["shares"].items()}
        ratios += [(numerator + suffix, denominator + suffix) for numerator, denominator in RATIOS[arguments.suite]]
    notes = {
        "batch_size": arguments.batch_size,
        "steps_per_block": arguments.steps,
        "rounds": arguments.rounds,
        "shares": shares,
    }
    result = Result.of_repeats(f"training-{arguments.suite}", rates, notes=notes)
    for numerator, denominator in ratios:
        result.add_ratio(numerator, denominator)
    for name, parts in shares.items():
        print(f"{name:42} {', '.join(f'{part} {value:g}' for part, value in parts.items())}")
    finish(result, threads=arguments.threads)


def run_cases(cases: Sequence[str], processes: int, *, threads: int, **numbers: int) -> dict[str, Any]:
    """Run cases in a launch of their own.

    Args:
        cases: their names.
        processes: of the launch.
        threads: of each process.
        numbers: batch_size, steps, repeats, rounds.

    Returns:
        {"rates": images per second by case, "shares": parts of a step by case}.
    """
    flags = [f"--{name}={number}" for name, number in {"threads": threads, **numbers}.items()]
    launcher = [sys.executable] if processes == 1 else accelerate_launch(processes)
    command = [*launcher, "-m", "benchmarks.training_case", *flags, "--cases", *cases]
    done = subprocess.run(command, env=cpu_threads(threads), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
