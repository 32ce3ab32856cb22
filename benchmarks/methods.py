"""Comparison of all distillation methods on CIFAR-10: `python -m benchmarks.methods --data DIR --teacher FILE`.

The student is a ResNet-18, the teacher a ResNet-18 without max-pool. Each student takes 624 steps of 128 images: 8 epochs of
10,000 images, crop and flip, a view per epoch, SGD with the learning rate that suits training on labels alone. The methods,
their weights and their seeds are in methods_table.py.

    1. `cache build`: the teacher's outputs for all methods, once; and the students without a teacher.
    2. All methods with the first seed and the weights of their sources; then the other seeds of the logit losses.
    3. The feature losses of several seeds with a tenth and ten times the weight. The accuracy on 4,925 validation images
       decides. Then their other seeds, with the chosen weight.
    4. The other feature losses with a tenth and ten times the weight.

Two trainings run at the same time, with one thread each. The same command continues after a kill, or with a further
`--budget_s`: runs with a line in OUT/methods.jsonl are skipped, others resume from their checkpoint. Another machine needs no
more than that file to continue. OUT/table.md is the table of the results so far, which is printed too; the last line is JSON
with the accuracies in percent.

`--cost` measures the time of a step of each method in place of training, in turns with plain `kl`, from the finished cache. It
needs an otherwise idle machine. `--trial` runs a few steps on generated images, with a random teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.budgeted_jobs import Job
from benchmarks.harness import Result, finish
from benchmarks.methods_cost import measure_costs, read_costs
from benchmarks.methods_results import Row, chosen_factor, read_row, results_table, run_name
from benchmarks.methods_table import METHODS, Method, chosen_methods, features_of_cache, missing_methods
from benchmarks.paired_runs import (
    CONFIGS,
    PairedOptions,
    cache_job,
    create_parser,
    parse_arguments,
    read_results,
    run_phases,
    start_comparison,
    training_job,
)

EPOCHS = 8
_TRIAL_METHODS = ("plain", "kl", "rkd")


@dataclass(frozen=True)
class Options(PairedOptions):
    """Arguments of the command line.

    Args:
        methods: Names of the methods.
        cost: Whether the time of a step is measured, and nothing is trained.
        repeats: Measured blocks of each method, for `cost`.
    """

    methods: tuple[str, ...]
    cost: bool
    repeats: int

    @property
    def ledger(self) -> Path:
        """Return the file with a line for each finished run, from which the comparison continues."""
        return self.out / "methods.jsonl"


def main() -> None:
    options = _parse()
    if missing := missing_methods():
        raise SystemExit(f"methods_table.py: no method has the registered losses {', '.join(missing)}; add their weights")
    methods = chosen_methods(options.methods)
    start_comparison(options)
    if options.cost:
        measure_costs({method.name: run_flags(options, method) for method in methods}, options.out, repeats=options.repeats)
    failed = [] if options.cost else _train(options, methods)
    results = read_results(options.ledger)
    rows = [read_row(method, results) for method in methods]
    table = results_table(rows, read_costs(options.out))
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    if not options.cost:
        _close(options, rows, failed)
    if failed:
        raise SystemExit(1)


def _parse() -> Options:
    parser = create_parser(__doc__, out="runs/methods")
    parser.add_argument("--methods", nargs="+", help="names of the methods (default: all)")
    parser.add_argument("--cost", action="store_true", help="measure the time of a step; needs the cache")
    parser.add_argument("--repeats", type=int, default=15, help="measured blocks of each method with --cost (default: 15)")
    arguments = parse_arguments(parser)
    everything = _TRIAL_METHODS if arguments.trial and not arguments.cost else tuple(method.name for method in METHODS)
    arguments.methods = tuple(arguments.methods or everything)
    return Options(**vars(arguments))


def _train(options: Options, methods: Sequence[Method]) -> list[str]:
    """Build the cache and train all methods within the budget; return the names of the failed jobs."""
    of_several_seeds = [method for method in methods if method.has_seeds]
    of_one_seed = [method for method in methods if not method.has_seeds]
    phases = (
        (_cache_jobs, methods),
        (_first_jobs, methods),
        (_tuning_jobs, of_several_seeds),
        (_last_jobs, of_several_seeds),
        (_tuning_jobs, of_one_seed),
    )
    return run_phases(options, options.ledger, [partial(jobs, options, chosen) for jobs, chosen in phases])


def _cache_jobs(options: Options, methods: Sequence[Method]) -> Iterable[Job]:
    """Yield the build of the cache, and the runs that do not need it."""
    features = {"distill": {"logits": None, "label_weight": 1.0, "features": features_of_cache()}}
    yield cache_job({**_flags(options), **options.teacher_flags, **features})
    for method in methods:
        if method.loss is None:
            yield from (_training(options, method, seed=seed) for seed in method.seeds)


def _first_jobs(options: Options, methods: Sequence[Method]) -> Iterable[Job]:
    """Yield the runs of all losses with the first seed, then those of the logit losses with the other seeds."""
    losses = [method for method in methods if method.loss is not None]
    for method in losses:
        yield _training(options, method, seed=method.seeds[0])
    for method in losses:
        if not method.is_tuned:
            yield from (_training(options, method, seed=seed) for seed in method.seeds[1:])


def _tuning_jobs(options: Options, methods: Sequence[Method]) -> Iterable[Job]:
    """Yield the runs of the feature losses with the other weights."""
    for method in methods:
        yield from (_training(options, method, seed=method.seeds[0], factor=factor) for factor in method.factors[1:])


def _last_jobs(options: Options, methods: Sequence[Method]) -> Iterable[Job]:
    """Yield the runs of the feature losses with the other seeds, if all weights have been tried."""
    results = read_results(options.ledger)
    for method in methods:
        factor, tried = chosen_factor(method, results)
        if method.is_tuned and tried == len(method.factors):
            yield from (_training(options, method, seed=seed, factor=factor) for seed in method.seeds[1:])


def _training(options: Options, method: Method, *, seed: int, factor: float = 1.0) -> Job:
    flags = {**run_flags(options, method, factor), "seed": seed}
    about = {"method": method.name, "seed": seed, "factor": factor}
    return training_job(options, run_name(method, factor, seed), flags, about, needs_cache=method.loss is not None)


def run_flags(options: Options, method: Method, factor: float = 1.0) -> dict[str, Any]:
    """Return the settings of a method's training, without name, seed and directory.

    Args:
        options: Arguments of the command line.
        method: The method.
        factor: Factor of the weight of a feature loss.
    """
    distill = method.distill(factor)
    return {**_flags(options), **({**options.teacher_flags, "distill": distill} if distill else {})}


def _flags(options: Options) -> dict[str, Any]:
    """Return the settings that all trainings share. The last evaluation is the only one, so the best one is the last one."""
    epochs = 1 if options.trial else EPOCHS
    flags = {
        "config": str(CONFIGS / "student.yaml"),
        "data.views": epochs,
        "train.epochs": epochs,
        "train.eval_every_epochs": epochs,
        "checkpoint.every_epochs": 2,
        "checkpoint.keep": 1,
        "tracking.wandb": "disabled",
    }
    if options.data is not None:
        return {**flags, "data.source": f"parquet:{options.data}"}
    generated = {"data.source": "import:benchmarks.synthetic:images", "data.image_column": "image"}
    return {**flags, **generated, "data.limit_train": 60, "data.limit_test": 40, "train.batch_size": 4}


def _close(options: Options, rows: Sequence[Row], failed: Sequence[str]) -> None:
    """Print the closing line of JSON, with the accuracies of the methods that have run."""
    accuracies = {row.method.name: row.accuracies for row in rows if row.accuracies}
    notes = {
        "trial": options.trial,
        "epochs": 1 if options.trial else EPOCHS,
        "weights": {row.method.name: row.method.scaled_weight(row.factor) for row in rows if row.method.is_tuned},
        "accuracies": accuracies,
        "failed": list(failed),
    }
    finish(Result.of_repeats("methods", accuracies, notes=notes, unit="percent"), threads=1)


if __name__ == "__main__":
    main()
