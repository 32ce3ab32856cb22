"""Gain of distillation over the length and over the labels: `python -m benchmarks.worth --data DIR --teacher FILE`.

The student is a ResNet-18, the teacher a ResNet-18 without max-pool: configs/cifar10_short/student.yaml and hybrid.yaml, each
with its own learning rate. Both are trained on 10,000 images of CIFAR-10 with all labels for 312, 936 and 2,730 steps of 128
images (4, 12 and 35 epochs), and for 936 steps with the labels of 1,000 of these images. With these few labels the plain
student learns from the labeled images alone, the distilled one also from the 9,000 others. Seeds are 0, 1 and 2.

Two trainings run at the same time, with one thread each; the first of the two is the build of the cache that all distilled
students read, while plain ones are trained. The first seed of everything is trained first, and the longest runs last.

The same command continues after a kill, or with a further `--budget_s`: runs with a line in OUT/worth.jsonl are skipped, others
resume from their checkpoint. Another machine needs no more than that file to continue. OUT/table.md is the table of the results
so far, which is printed too; the last line is JSON with the accuracies in percent. `--trial` runs a few steps on generated
images, with a random teacher and one seed.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.budgeted_jobs import Job
from benchmarks.harness import Result, finish
from benchmarks.paired_runs import (
    cache_job,
    create_parser,
    parse_arguments,
    read_results,
    run_phases,
    start_comparison,
    training_job,
)
from benchmarks.synthetic import images
from benchmarks.worth_plan import Options, cache_flags, run_flags, write_unlabeled
from benchmarks.worth_results import accuracies_of, worth_table

_TRIAL_IMAGES = {"train": 80, "test": 20}


def main() -> None:
    options = Options(**vars(parse_arguments(create_parser(__doc__, out="runs/worth"))))
    start_comparison(options)
    if options.trial:
        write_trial_images(options.images)
    write_unlabeled(options)
    failed = run_phases(options, options.ledger, [lambda: jobs(options)])
    table = worth_table(options.design, read_results(options.ledger))
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    _close(options, failed)
    if failed:
        raise SystemExit(1)


def jobs(options: Options) -> Iterable[Job]:
    """Return the jobs that have not finished in an earlier call, the build of the cache first, if a run needs it.

    Args:
        options: Arguments of the command line.
    """
    finished = read_results(options.ledger)
    runs = [run for run in options.design.runs if run.name not in finished]
    if any(run.group.is_distilled for run in runs):
        yield cache_job(cache_flags(options))
    for run in runs:
        yield training_job(options, run.name, run_flags(options, run), run.about, needs_cache=run.group.is_distilled)


def write_trial_images(directory: Path) -> None:
    """Write generated images as Parquet files with the columns of CIFAR-10."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(exist_ok=True)
    for split, number in _TRIAL_IMAGES.items():
        generated: Any = images(split, 32)
        cells = [{"bytes": _png(Image.fromarray(pixels)), "path": None} for pixels in generated["images"][:number]]
        pq.write_table(pa.table({"img": cells, "label": generated["labels"][:number]}), directory / f"{split}-0.parquet")


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _close(options: Options, failed: Sequence[str]) -> None:
    """Print the closing line of JSON, with the accuracies of the runs that have finished."""
    groups = accuracies_of(options.design, read_results(options.ledger))
    accuracies = {group.name: values for group, values in groups.items() if values}
    notes = {"trial": options.trial, "accuracies": accuracies, "failed": list(failed)}
    finish(Result.of_repeats("worth", accuracies, notes=notes, unit="percent"), threads=1)


if __name__ == "__main__":
    main()
