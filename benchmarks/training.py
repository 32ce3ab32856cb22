"""Training speed of kd_accel relative to bare PyTorch loops, with and without distillation.

    python -m benchmarks.training                    all cases, in one process and in two
    python -m benchmarks.training --suite quick      one process: plain / bare
    python -m benchmarks.training --suite cached     one process: cached_logits / plain, cached_hybrid / plain,
                                                     live_hybrid / limit, and the feature term alone

All cases train the same student (see jobs.py) with fused SGD and Nesterov momentum:
    plain, cached_..., live_...   trainings by kd_accel with all their parts: order of the samples, views (crop_flip), loading,
                                  normalization, teacher, loss, metrics, learning rate, a line of metrics at the end of a block.
                                  Hybrids have direction `both` unless the name has another one. `cached_...` read the next view
                                  of a cache in each block, so that a block includes opening the view, which a real training
                                  does once in hundreds of steps.
    bare, limit...                bare loops (bare.py): forward, backward and update on normalized tensors in memory. `limit`
                                  has a live teacher and the feature term; `limit_cached_...` have the teacher's outputs in
                                  memory.

The result is images/s; a block is an epoch of a few steps; the cases take turns. Each round builds all students from scratch,
because the memory addresses of the weights change the time of a step by up to 3 %. Two processes share the batch, with
`--threads` threads each; the names of their cases end in `@2`. The notes have the share of each part in a step of kd_accel,
from one more block under torch.profiler. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import Result, accelerate_launch, benchmark_parser, cpu_threads, finish, most_processes

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
    parser = benchmark_parser(__doc__, repeats=9, steps=4)
    parser.add_argument("--suite", choices=list(RATIOS), default="all", help="cases to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="number of times that all students are built (default: 3)")
    parser.add_argument("--processes", type=int, nargs="+", help="process counts, one launch each (default: of the suite)")
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
        shown = (f"{part} {100 * share:.1f} %" for part, share in parts.items() if part != "step_ms")
        print(f"{name:42} step {parts['step_ms']:.4g} ms: {', '.join(shown)}")
    finish(result, threads=arguments.threads)


def run_cases(cases: Sequence[str], processes: int, *, threads: int, **numbers: int) -> dict[str, Any]:
    """Run cases in one launch.

    Args:
        cases: Names of the cases.
        processes: Processes of the launch.
        threads: CPU threads of each process.
        numbers: The options batch_size, steps, repeats and rounds.

    Returns:
        {"rates": {case: images/s of each block}, "shares": {case: {"step_ms": ..., part: share of the step}}}.
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
