"""`kd-accel report`: the table of results and the pictures, from what runs and bench left on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd_accel.report.tables import write_report


def run_report(runs: Sequence[Path], *, out: Path, bench_file: Path | None) -> None:
    """Write results.md, results.json and the pictures to `out`, and print the table."""
    print(write_report(runs, out=out, bench_file=bench_file))
    print(f"\nWritten to {out}")
