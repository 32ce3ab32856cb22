"""`kd-accel report`: tables, pictures and one HTML page, from the files of runs and of `kd-accel bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd_accel.report.output import write_report


def run_report(runs: Sequence[Path], *, out: Path, bench_file: Path | None) -> None:
    """Write results.md, results.json, index.html and the pictures to `out`, and print the table."""
    print(write_report(runs, out=out, bench_file=bench_file))
    print(f"\nWritten to {out}")
