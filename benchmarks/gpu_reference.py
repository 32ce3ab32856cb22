"""Reference job on a GPU within minutes, from CIFAR-10 in Parquet files to the report.

    python -m benchmarks.gpu_reference --data DIR --out OUT --part pair|reference [--budget_s 240] [--stem cifar] [--trial]

Part `pair` is ResNet-50 to ResNet-18 without max-pool in bf16, with two seeds if time allows. Part `reference` is the four rows
of the reference job. The settings are in gpu_reference_plan.py. Each step runs commands of kd_accel:

    1. The teacher and the first plain student, concurrently. The student is stopped by SIGTERM and resumed. The first measured
       rates decide the number of epochs of all trainings.
    2. `cache build`, and concurrently the plain student of the second seed.
    3. The distilled students, which read the cache, and concurrently `cache verify`.
    4. A cached training and a live training, each alone. Their images/s are those of metrics.jsonl without the first two lines.
    5. `bench` and `report` of the trainings that have finished.

OUT/gpu_reference.jsonl receives a line of JSON after each command, a line with the reason for each command that was not run,
and the closing line of every benchmark, which is also printed. OUT/report has the table; each part needs its own OUT. Runs,
cache and logs are in a temporary directory, or are kept in --work.

The exit code is 1 if a command failed, otherwise 0, also when the budget has ended. Without a GPU nothing is run. With --trial
everything runs on a CPU with small settings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.budgeted_jobs import Ledger, Runner
from benchmarks.gpu_reference_chain import TIMED, Chain, Options
from benchmarks.gpu_reference_plan import ROOT
from benchmarks.harness import Result, finish

_PROGRAM = (sys.executable, "-m", "kd_accel")
_FIRST_START_S = 10.0
_CLOSING_S, _CLOSING_SHARE = 30.0, 0.25
"""Time reserved for bench and report, in seconds and as the largest share of the budget."""
_CONCURRENT = 4


def main() -> None:
    options = _parse()
    if not options.trial and not torch.cuda.is_available():
        print("no GPU was found; nothing was measured")
        return
    deadline = time.monotonic() + options.budget_s
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for directory in filter(None, (options.out, options.work)):
        directory.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"gpu-reference-{options.part}-", dir=options.work))
    ledger = Ledger(options.out / "gpu_reference.jsonl")
    try:
        with _runner(options, ledger, work, ends_at=deadline) as runner:
            chain = Chain(options, work, runner)
            chain.run()
            runner.ends_at, runner.least_s = deadline, 0.0
            chain.report()
        _close(chain, options, work)
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if ledger.failed:
        raise SystemExit(1)


def _parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of train-*.parquet and test-*.parquet, with columns img and label")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results, a few small files")
    parser.add_argument("--part", choices=["pair", "reference"], required=True, help="trainings to run")
    parser.add_argument("--budget_s", type=float, default=240.0, help="time for everything, in seconds (default: 240)")
    parser.add_argument("--stem", choices=["no_pool", "cifar"], default="no_pool", help="stem of the networks of part pair")
    parser.add_argument("--seeds", type=int, help="largest number of seeds of part pair (default: 2, with --trial 1)")
    parser.add_argument("--epochs", type=int, help="largest number of epochs of a training (default: 30, with --trial 2)")
    parser.add_argument("--limit_train", type=int, help="number of training images (default: all)")
    parser.add_argument("--trial", action="store_true", help="small settings on a CPU; generated images unless --data is given")
    parser.add_argument("--work", type=Path, help="directory in which runs, cache and logs are kept")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.trial and torch.cuda.is_available():
        parser.error("--data is required without --trial")
    for name in ("data", "out", "work"):
        path = getattr(arguments, name)
        setattr(arguments, name, path and path.resolve())
    arguments.seeds = arguments.seeds or (1 if arguments.trial else 2)
    return Options(**vars(arguments))


def _runner(options: Options, ledger: Ledger, work: Path, *, ends_at: float) -> Runner:
    """Return a runner of kd_accel that reserves time for the last two commands; all caches are inside `work`."""
    threads = 1 if options.trial else max(1, (os.cpu_count() or 1) // _CONCURRENT)
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    paths = {"HF_HOME": str((options.work or work) / "hf"), "PYTHONPATH": search_path}
    closing_s = min(_CLOSING_S, _CLOSING_SHARE * options.budget_s)
    return Runner(
        ledger,
        work / "logs",
        ends_at=ends_at - closing_s,
        least_s=_FIRST_START_S,
        program=_PROGRAM,
        environment={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **paths},
    )


def _close(chain: Chain, options: Options, work: Path) -> None:
    """Write the line of the skipped jobs and the closing line."""
    ledger = chain.ledger
    if ledger.not_done:
        ledger.write({"not_done": list(ledger.not_done), "reasons": ledger.not_done})
    timed = {outputs: ledger.done[f"timed-{outputs}"]["rates"] for outputs in TIMED if f"timed-{outputs}" in ledger.done}
    fewest = min(map(len, timed.values()), default=0)
    repeats = {name: rates[:fewest] for name, rates in timed.items()}
    result = Result.of_repeats("gpu-reference", repeats, notes=_notes(chain, options))
    if len(timed) == len(TIMED):
        result.add_ratio(*TIMED)
    finish(result, out_dir=work / "closing")
    (closing,) = (work / "closing").iterdir()
    ledger.append(closing.read_text(encoding="utf-8").strip())


def _notes(chain: Chain, options: Options) -> dict[str, Any]:
    rows = chain.finished_rows()
    by_row = {key: {name: chain.ledger.done[name][key] for name in rows} for key in ("accuracy", "agreement")}
    return {
        "part": options.part,
        "trial": options.trial,
        "budget_s": options.budget_s,
        "stem": options.stem if options.part == "pair" else "imagenet",
        "precision": chain.part.precision,
        "batch_size": chain.part.batch_size,
        "epochs": chain.part.epochs,
        "epochs_planned": chain.planned.epochs,
        **by_row,
        "failed": chain.ledger.failed,
        "not_done": chain.ledger.not_done,
        "gpu": _gpu_and_driver(),
    }


def _gpu_and_driver() -> str | None:
    """Return the name, driver and memory of the GPU as nvidia-smi prints them; None without nvidia-smi."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip() or None


if __name__ == "__main__":
    main()
