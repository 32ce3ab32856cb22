"""Operators per training step by part, compared with the bare loops: `python -m benchmarks.launches`.

Counts every training of training_case.py and every limit of bare.py, in float32 and in bf16 autocast. Nothing is timed and no
GPU is needed: the steps run on a CPU with the code paths of a GPU (images stored and views made on the device, channels_last
features and weights, PyTorch's kernels, copies from the host). The last two of three steps must agree in every operator; the
line of metrics is not included. The batch size does not affect the counts.

One dispatched operator counts as one launch, also a fused or foreach operator. Views, allocations and work on the host do not
count (operators.py). docs/gpu.md has the printed tables, with these columns:

    loader ... logging      profiler ranges of kd_accel/profiling.py; a nested range counts for the inner name only
    rest                    outside of all ranges: copies of a batch from the host
    in all                  launches per step
    limit, distance         launches of the same training as a bare loop, and the difference
    views, allocations      operators that launch no kernel, included in no other column
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState

from benchmarks.bare import LIMITS
from benchmarks.harness import Result, benchmark_parser, finish
from benchmarks.jobs import Size, open_bench
from benchmarks.operators import REST, OperatorCounter, StepCounts, counted
from benchmarks.training_case import TRAININGS, CaseBuilder
from kd_accel.config.schema import Precision
from kd_accel.models import preprocess

STEPS = 3
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")
PARTS = ("loader", "teacher", "student", "projector", "loss", "backward", "optimizer", "average", "logging", REST)
LIMIT_OF = {
    **{name: "bare" for name in TRAININGS if name.startswith("plain")},
    "live_logits": "limit_live_logits",
    "live_hybrid": "limit",
    "cached_logits": "limit_cached_logits",
    "cached_hybrid": "limit_cached_hybrid",
    "cached_hybrid_int8": "limit_cached_hybrid",
}
Counts = Mapping[str, StepCounts]
"""{case: counts of one step}."""


def main() -> None:
    parser = benchmark_parser(__doc__, steps=None, batch_size=2)
    names = [*LIMITS, *TRAININGS]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="cases to count (default: all)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="precisions (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = Result("launches", unit="operators", notes={"batch_size": arguments.batch_size, "by_part": {}, "free": {}})
    for precision in arguments.precisions:
        counts = count_cases(arguments.cases, precision, batch_size=arguments.batch_size)
        print(f"Operators per step in {precision}:\n\n{table(counts)}\n")
        _add_counts(result, counts, precision)
    finish(result)


def count_cases(names: Sequence[str], precision: Precision, *, batch_size: int) -> dict[str, StepCounts]:
    """Count a step of each case, a training of training_case.py or a limit of bare.py."""
    # Accelerate keeps the precision of the first `Accelerator` in a process.
    AcceleratorState._reset_state(reset_partial_state=True)
    bench = open_bench(Size(batch_size, STEPS), precision=precision, as_gpu=True)
    with tempfile.TemporaryDirectory() as directory:
        builder = CaseBuilder(bench, Path(directory), views=1)
        return {name: count_step(builder.case(name, Path(directory) / name, blocks=1)) for name in names}


def count_step(block: Callable[[], float]) -> StepCounts:
    """Count the last step of a block of several steps.

    Raises:
        RuntimeError: If the last two steps differ in an operator.
    """
    # On a CPU `Normalize` repeats its three values along the pixel rows of channels_last images; on a GPU it does not.
    with (
        mock.patch.object(preprocess, "_repeat_along_row", lambda values, pixels: values),
        counted(OperatorCounter()) as counter,
    ):
        block()
    before, last = counter.steps[-2:]
    if before != last:
        raise RuntimeError(f"two steps differ: {_difference(before, last)}")
    return last


def table(counts: Counts) -> str:
    """Return a Markdown table with a row for each case."""
    head = ["case", *PARTS, "in all", "limit", "distance", "views, allocations"]
    rows = [[name, *_row(name, counts)] for name in counts]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows])


def _row(name: str, counts: Counts) -> list[str]:
    step, limit = counts[name], counts.get(LIMIT_OF.get(name, ""))
    numbers = [step.by_part.get(part, 0) for part in PARTS]
    total = step.launches.total()
    against = ["-", "-"] if limit is None else [str(limit.launches.total()), str(total - limit.launches.total())]
    return [*map(str, numbers), str(total), *against, str(step.free.total())]


def _add_counts(result: Result, counts: Counts, precision: str) -> None:
    for name, step in counts.items():
        case = f"{name}@{precision}"
        result.add_repeats({case: [float(step.launches.total())]})
        result.notes["by_part"][case], result.notes["free"][case] = step.by_part, step.free.total()
    for name, limit in LIMIT_OF.items():
        if name in counts and limit in counts:
            result.add_ratio(f"{name}@{precision}", f"{limit}@{precision}")


def _difference(before: StepCounts, last: StepCounts) -> str:
    counters = ((before.launches, last.launches), (before.free, last.free))
    keys = sorted({key for first, second in counters for key in first | second if first[key] != second[key]})
    return ", ".join(f"{operator} in {part}" for part, operator in keys)


if __name__ == "__main__":
    main()
