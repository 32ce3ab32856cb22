"""Reference job on a GPU within minutes, from CIFAR-10 in Parquet to the report: `python -m benchmarks.gpu_reference`.

    python -m benchmarks.gpu_reference --data DIR --out OUT --part pair|reference [--budget_s 240] [--stem cifar] [--trial]

`pair` is ResNet-50 to ResNet-18 without max-pool in bf16, two seeds as time allows; `reference` the four rows of the reference
job (gpu_reference_plan.py has the settings). Each step is a command of the product in a process of its own:

    1. Teacher and first plain student side by side. The student is stopped by SIGTERM and resumed. Their first rates decide how
       many epochs all trainings have.
    2. `cache build`, and next to it the plain student of the second seed.
    3. The distilled students from the cache, and `cache verify`, side by side.
    4. A cached training and a live one, each alone: images/s from their metrics.jsonl, without the first two lines.
    5. `bench` and `report` of what was finished.

OUT/gpu_reference.jsonl gets a line after each command, a line of the commands that were not run with the reasons, and last the
closing line of all suites, which is also printed. OUT/report holds the table; each part needs an OUT of its own. Runs, cache
and logs are in a temporary directory, or in --work to be kept. The exit code is 1 after a failure and 0 otherwise, also if the
budget has ended, and without a GPU, where nothing runs. --trial runs all of it in small on a CPU.
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
"""Time kept for bench and report, in seconds, and as the share of a short budget."""
_SIDE_BY_SIDE = 4


def main() -> None:
    options = _parse()
    if not options.trial and not torch.cuda.is_available():
        print("no GPU was found: nothing was measured")
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
    parser.add_argument("--data", type=Path, help="directory with train-*.parquet and test-*.parquet, columns img and label")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results, a few small files")
    parser.add_argument("--part", choices=["pair", "reference"], required=True)
    parser.add_argument("--budget_s", type=float, default=240.0, help="for everything, bench and report included")
    parser.add_argument("--stem", choices=["no_pool", "cifar"], default="no_pool", help="pair: of teacher and students")
    parser.add_argument("--seeds", type=int, help="pair: of the students, as time allows; 2, or 1 with --trial")
    parser.add_argument("--epochs", type=int, help="of every training if they fit; 30, or 2 with --trial")
    parser.add_argument("--limit_train", type=int, help="use only this many training images")
    parser.add_argument("--trial", action="store_true", help="all of it in small; on generated images unless --data is given")
    parser.add_argument("--work", type=Path, help="directory in which runs, cache and logs are kept")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.trial and torch.cuda.is_available():
        parser.error("--data is missing; only --trial has images of its own")
    for name in ("data", "out", "work"):
        path = getattr(arguments, name)
        setattr(arguments, name, path and path.resolve())
    arguments.seeds = arguments.seeds or (1 if arguments.trial else 2)
    return Options(**vars(arguments))


def _runner(options: Options, ledger: Ledger, work: Path, *, ends_at: float) -> Runner:
    """Return a runner of the product that keeps time for the last two commands and writes inside `work` alone."""
    threads = 1 if options.trial else max(1, (os.cpu_count() or 1) // _SIDE_BY_SIDE)
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    places = {"HF_HOME": str((options.work or work) / "hf"), "PYTHONPATH": search_path}
    closing_s = min(_CLOSING_S, _CLOSING_SHARE * options.budget_s)
    return Runner(
        ledger,
        work / "logs",
        ends_at=ends_at - closing_s,
        least_s=_FIRST_START_S,
        program=_PROGRAM,
        environment={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **places},
    )


def _close(chain: Chain, options: Options, work: Path) -> None:
    """Write the jobs that were not done, and the closing line of all suites."""
    ledger = chain.ledger
    if ledger.not_done:
        ledger.write({"not_done": list(ledger.not_done), "reasons": ledger.not_done})
    timed = {outputs: ledger.done[f"timed-{outputs}"]["rates"] for outputs in TIMED if f"timed-{outputs}" in ledger.done}
    fewest = min(map(len, timed.values()), default=0)
    result = Result.of_repeats(
        "gpu-reference", {name: found[:fewest] for name, found in timed.items()}, notes=_notes(chain, options)
    )
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
    """Return name, driver and memory as nvidia-smi prints them; None without it."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip() or None


if __name__ == "__main__":
    main()
