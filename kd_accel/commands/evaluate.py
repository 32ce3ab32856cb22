"""`kd-accel evaluate`: metrics and predictions of finished runs on a held-out split, in any number of processes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from kd_accel.builders.evaluation import evaluate_run
from kd_accel.config.schema import RunConfig
from kd_accel.data.splits import HeldOutSplit
from kd_accel.distributed import on_main_process
from kd_accel.report.predictions import check_predictions_file, write_predictions


def run_evaluations(
    runs: Sequence[Path], configs: Sequence[RunConfig], *, split: HeldOutSplit, out: Path | None = None
) -> None:
    """Evaluate finished runs in turn, and print the result of each with `run` and `split` as one line of JSON.

    Args:
        runs: Run directories.
        configs: Config of each evaluation.
        split: Held-out split.
        out: Parquet file for the predictions of all runs, written at the end by the main process; None = no file.

    Raises:
        UserError: If a run cannot be evaluated, or the file cannot be written.
    """
    if out is not None:
        check_predictions_file(out)
    tables, names = [], {}
    for run, config in zip(map(str, runs), configs, strict=True):
        found = evaluate_run(Path(run), config, split=split, has_header=True, keeps_probabilities=out is not None)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps({"run": run, "split": split, **found.metrics}), flush=True)
        if out is not None:
            tables.append(found.table(run))
            names[run] = found.label_names
    if out is not None:
        on_main_process(found.accelerator, lambda: write_predictions(out, tables, label_names=names))
