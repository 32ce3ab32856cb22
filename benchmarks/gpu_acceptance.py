"""Acceptance test of kd_accel on a GPU: correctness and speed of all that depends on the device, in about three minutes.

    python -m benchmarks.gpu_acceptance --out DIR [--budget_s 180] [--only a,b] [--trial]

    a  ten steps of every kind of training, none of which may synchronize the device
    b  images/s, kernels per step, their time and memory of kd_accel next to the bare loops, replayed and eager
    c  losses against the CPU, views made on the device against those made on the host, cached against live outputs
    d  two ranks on one GPU, with a signal and a resume, and one rank over NCCL
    e  exact resume, and losses or gradients that are not finite
    f  `cache build` next to the teacher's forward alone, and `cache verify`
    g  compiled trainings
    h  steps replayed as a CUDA graph against the same steps without

Each item is a module of benchmarks/acceptance/. DIR/gpu_acceptance.jsonl receives a line of JSON as soon as a case has ended;
DIR/gpu_acceptance.log has the output of all processes. A case that fails, hangs or crashes does not affect later cases. The
closing line of JSON lists the cases that passed, that failed, and that were not run, with the reason.

The exit code is 1 if a case failed, otherwise 0. Without a GPU nothing is measured and the exit code is 0. With `--trial`
everything runs on a CPU with small settings.

Order: the items that measure no time (a, c, d, e, h) come first and run concurrently, so that they take about as long as the
longest of them. The timed items run alone: f takes half a minute, b gives the figures that matter most, and g is last
because it compiles, followed by the compiled loop of b.
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

LEAST_S = 6.0
"""Time that must be left to start a process, which needs this long to reach its first case."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results and the log")
    parser.add_argument("--budget_s", type=float, default=180.0, help="time for everything, in seconds (default: 180)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(ITEMS), help="items to run, for example a,b")
    parser.add_argument("--trial", action="store_true", help="run with small settings on a CPU")
    arguments = parser.parse_args(argv)
    if unknown := [item for item in arguments.only if item not in ITEMS]:
        parser.error(f"--only: {', '.join(unknown)} is not a valid item; choose from {', '.join(ITEMS)}")
    set_environment()
    parts = [part for part in planned(is_trial=arguments.trial) if part.item in arguments.only]
    logs = arguments.out / "logs"
    try:
        with Starter(logs, budget_s=arguments.budget_s) as starter:
            # Imported while the fork server imports it too, since both take seconds.
            import torch

            # The closing line is written even after a signal, so a signal ends the budget instead of the process.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: starter.end_budget())

            if not torch.cuda.is_available() and not arguments.trial:
                print("no GPU was found; nothing was measured")
                return
            passed = run(parts, arguments.out, starter, is_trial=arguments.trial)
    finally:
        join_logs(logs, arguments.out / "gpu_acceptance.log")
    if not passed:
        raise SystemExit(1)


def run(parts: Sequence[Part], out: Path, starter: Starter, *, is_trial: bool = False) -> bool:
    """Run parts within the budget, and write the closing line.

    Args:
        parts: Parts in their order.
        out: Directory of the results.
        starter: Starter of processes, with the budget.
        is_trial: Whether to use the small settings.

    Returns:
        Whether no case failed.
    """
    started_at, method = time.monotonic(), starter.choose_method()
    record = Record(out / "gpu_acceptance.jsonl", _provenance())
    before_bytes = record.length_bytes()
    not_run: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(is_trial, Path(scratch), record)

        def run_if_time_is_left(part: Part) -> None:
            if starter.left_s > LEAST_S:
                not_run.update(run_part(part, setting, starter))
            else:
                not_run.update({f"{part.item}/{part.label(case)}": BUDGET for case in part.cases})

        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
            list(pool.map(run_if_time_is_left, [part for part in parts if not part.is_timed]))
        # A failed case may leave commands running, which would disturb the timed parts.
        starter.kill_running()
        for part in parts:
            if part.is_timed:
                run_if_time_is_left(part)
    notes = {"not_run": not_run, "seconds": round(time.monotonic() - started_at, 1), "start_method": method}
    return _close(record, record.lines(since_bytes=before_bytes), out, notes)


def join_logs(logs: Path, joined: Path) -> None:
    """Append the logs of a directory to one file, each below its name, and remove the directory.

    One file is easier to fetch from a remote machine than a directory of logs.
    """
    for log in sorted(logs.glob("*.log")):
        with joined.open("a", encoding="utf-8") as file:
            file.write(f"== {log.stem}\n{log.read_text(encoding='utf-8', errors='replace')}\n")
    shutil.rmtree(logs, ignore_errors=True)


def set_environment() -> None:
    """Set the environment variables of all processes."""
    # The check for a GPU goes through NVML, because CUDA cannot be used in a process forked after its initialization.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 8)))
    # The fork server must not have threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _close(record: Record, lines: Sequence[Figures], out: Path, notes: Figures) -> bool:
    """Print and write the closing line; return whether no case failed."""
    from benchmarks.harness import Result, finish

    ok, failed = ([f"{line['item']}/{line['case']}" for line in lines if line["ok"] is is_ok] for is_ok in (True, False))
    result = Result("gpu-acceptance", notes={"ok": ok, "failed": failed, **notes})
    for line in lines:
        if not line["ok"]:
            print(f"{line['item']}/{line['case']} failed: {line.get('error', 'a figure is outside its tolerance')}")
        for name, figures in line.get("cases", {"": line}).items():
            if "images_per_s" in figures:
                case = "/".join(filter(None, (line["item"], line["case"], name)))
                result.medians[case], result.spread[case] = figures["images_per_s"], figures.get("spread", 0.0)
    for case, reason in notes["not_run"].items():
        print(f"{case} was not run: {reason}")
    record.append(finish(result, out_dir=out))
    return not failed


def _provenance() -> Figures:
    """Return commit, GPU and versions, which are part of every line."""
    from benchmarks.harness import provenance

    about = provenance()
    return {"commit": about["commit"], "card": next(iter(about["hardware"]["gpus"]), None), "versions": about["versions"]}


if __name__ == "__main__":
    main()
