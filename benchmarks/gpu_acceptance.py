"""Acceptance of a GPU: checks of everything that can be wrong or slow on one, in a command of about three minutes.

    python -m benchmarks.gpu_acceptance --out DIR [--budget_s 180] [--only a,b] [--trial]

    a  ten steps of every way of training in which nothing may synchronize the device
    b  images per second, operators per step, busy share and memory of the program next to its limits
    c  losses against the CPU, views of the device against the host's, cached against live outputs
    d  two ranks on the one GPU, a signal and a resume among them, and one rank over NCCL
    e  exact resume, and numbers that are not finite
    f  `cache build` and `verify`
    g  compiled trainings

benchmarks/acceptance/ has a module for each. DIR/gpu_acceptance.jsonl gets a line of JSON as soon as a case has ended; a case
that fails, hangs or crashes does not affect the others, and DIR/gpu_acceptance.log has the output of all processes. The closing
line of JSON lists the cases that are ok, failed and not run, the last with the reason. The exit code is 1 if a case has failed.
Without a GPU nothing is measured and the exit code is 0; `--trial` runs all of it in small on a CPU.

Correctness (a, c, d, e) comes before speed. Those four measure no time, so they run side by side and cost about as much as the
longest of them. f follows, which takes seconds, then b, the figures on which later work on speed is based; g compiles for half
a minute or more, and nothing depends on it, so it is last. Timed parts run alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.acceptance.guard import Part, run_part
from benchmarks.acceptance.plan import ITEMS, planned
from benchmarks.acceptance.record import Figures, Record, Setting
from benchmarks.acceptance.starting import BUDGET, Starter

LEAST_S = 4.0
"""Least time left to start a process: with less, it does not reach its first case."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the lines and logs")
    parser.add_argument("--budget_s", type=float, default=180.0, help="time for all of it, in seconds")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ITEMS), help="items, such as a,b")
    parser.add_argument("--trial", action="store_true", help="all of it in small on a CPU")
    arguments = parser.parse_args(argv)
    if unknown := [item for item in arguments.only if item not in ITEMS]:
        parser.error(f"--only: {', '.join(unknown)} is not a valid item; choose from {', '.join(ITEMS)}")
    set_environment()
    parts = [part for part in planned(is_trial=arguments.trial) if part.item in arguments.only]
    logs = arguments.out / "logs"
    try:
        with Starter(logs, budget_s=arguments.budget_s) as starter:
            import torch  # here, while the process that is forked later imports it

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *about: starter.end_budget())  # the closing line is written all the same

            if not torch.cuda.is_available() and not arguments.trial:
                print("no GPU was found: nothing was measured")
                return
            has_worked = run(parts, arguments.out, starter, is_trial=arguments.trial)
    finally:
        join_logs(logs, arguments.out / "gpu_acceptance.log")
    if not has_worked:
        raise SystemExit(1)


def run(parts: Sequence[Part], out: Path, starter: Starter, *, is_trial: bool = False) -> bool:
    """Run parts as far as the budget allows and write the closing line. Returns whether nothing has failed."""
    started_at, method = time.monotonic(), starter.choose_method()
    record = Record(out / "gpu_acceptance.jsonl", _in_each_line())
    before_bytes = record.length_bytes()
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(is_trial, Path(scratch), record)

        def run_one(part: Part) -> None:
            if starter.left_s > LEAST_S:
                left_out.update(run_part(part, setting, starter))
            else:
                left_out.update({f"{part.item}/{part.label(case)}": BUDGET for case in part.cases})

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
            list(pool.map(run_one, [part for part in parts if not part.is_timed]))
        starter.kill_running()  # commands of cases that have failed before
        for part in parts:
            if part.is_timed:
                run_one(part)
    notes = {"not_run": left_out, "seconds": round(time.monotonic() - started_at, 1), "start_method": method}
    return _close(record, record.lines(since_bytes=before_bytes), out, notes)


def join_logs(logs: Path, joined: Path) -> None:
    """Append each log of a directory to one file, under its name, and remove the directory.

    A machine that is lent for minutes may give back only a few files.
    """
    for log in sorted(logs.glob("*.log")):
        with joined.open("a", encoding="utf-8") as file:
            file.write(f"== {log.stem}\n{log.read_text(encoding='utf-8', errors='replace')}\n")
    shutil.rmtree(logs, ignore_errors=True)


def set_environment() -> None:
    """Set the variables of all processes. The check by NVML does not touch the GPU, as no process may before it is forked."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 8)))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # no threads in the process that is forked


def _close(record: Record, lines: Sequence[Figures], out: Path, notes: Figures) -> bool:
    from benchmarks.harness import Result, finish

    ok, failed = ([f"{line['item']}/{line['case']}" for line in lines if line["ok"] is is_ok] for is_ok in (True, False))
    result = Result("gpu-acceptance", notes={"ok": ok, "failed": failed, **notes})
    for line in lines:
        if not line["ok"]:
            print(f"{line['item']}/{line['case']} failed: {line.get('error', 'its figures are not as required')}")
        for name, figures in line.get("cases", {"": line}).items():
            if "images_per_s" in figures:
                case = "/".join(filter(None, (line["item"], line["case"], name)))
                result.medians[case], result.spread[case] = figures["images_per_s"], figures.get("spread", 0.0)
    for case, reason in notes["not_run"].items():
        print(f"{case} was not run: {reason}")
    record.append(finish(result, out_dir=out))
    return not failed


def _in_each_line() -> Figures:
    from benchmarks.harness import provenance

    about = provenance()
    return {"commit": about["commit"], "card": next(iter(about["hardware"]["gpus"]), None), "versions": about["versions"]}


if __name__ == "__main__":
    main()
