"""Table of a sweep: mean and standard deviation of each trial over its seeds, and the best trial by validation accuracy.

In: run directories of the finished runs. Out: results.md and results.json. Accuracies are fractions of 1 in files and percent
in the table. The test split never decides.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd_accel.errors import UserError
from kd_accel.io.files import write_json, write_whole
from kd_accel.report.run_files import RunResult, load_result


@dataclass(frozen=True)
class SweepRun:
    """Accuracies of one finished run, fractions of 1; None without labels or without validation samples.

    With `checkpoint.keep_best` they are those of the weights of the best epoch, else those of the last weights.

    Attributes:
        seed: Seed.
        directory: Run directory.
        val_accuracy: Accuracy on the validation split.
        test_accuracy: Accuracy on the test split.
    """

    seed: int
    directory: Path
    val_accuracy: float | None
    test_accuracy: float | None


@dataclass
class TrialResult:
    """Finished runs of one trial.

    Attributes:
        name: Name of the trial.
        settings: Settings of the grid by dotted name, as text.
        runs: Finished runs.
    """

    name: str
    settings: Mapping[str, str]
    runs: list[SweepRun] = field(default_factory=list)

    def accuracies(self, split: str) -> list[float]:
        """Return the accuracies on a split, `val` or `test`; empty if a run has none."""
        found = [run.val_accuracy if split == "val" else run.test_accuracy for run in self.runs]
        return [] if None in found else [accuracy for accuracy in found if accuracy is not None]


def read_run(directory: Path, *, seed: int) -> SweepRun:
    """Read the accuracies of a finished run. Raises UserError if a file is missing or damaged."""
    result = load_result(directory, None)
    try:
        val, test = _accuracies(result)
        return SweepRun(seed, directory, *(None if value is None else float(value) for value in (val, test)))
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{directory}: an accuracy is damaged (not a number); train the run again") from None


def best_trial(results: Sequence[TrialResult], *, num_seeds: int) -> TrialResult | None:
    """Return the trial with the largest mean validation accuracy, the first of equal ones.

    Args:
        results: Results of all trials.
        num_seeds: Number of runs of a finished trial.

    Returns:
        The trial; None if a run is not finished or has no validation accuracy.
    """
    if any(len(result.accuracies("val")) < num_seeds for result in results):
        return None
    return max(results, key=lambda result: statistics.fmean(result.accuracies("val")))


def sweep_table(results: Sequence[TrialResult], *, num_seeds: int) -> str:
    """Format the results as a Markdown table with one row for each trial."""
    names = list(dict.fromkeys(name for result in results for name in result.settings))
    lines = [[*names, "Validation accuracy (%)", "Test accuracy (%)", "Seeds"], ["---"] * len(names) + ["---:"] * 3]
    for result in results:
        shown = [result.settings.get(name, "").replace("|", "\\|") for name in names]
        figures = [_percent(result.accuracies(split)) for split in ("val", "test")]
        number = len(result.runs)
        lines.append([*shown, *figures, str(number) if number == num_seeds else f"{number} of {num_seeds}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_sweep_report(results: Sequence[TrialResult], *, num_seeds: int, out: Path) -> str:
    """Write results.md and results.json.

    Args:
        results: Results of all trials, also of those without a finished run.
        num_seeds: Number of runs of a finished trial.
        out: Directory to write to.

    Returns:
        The table, and the best trial once all runs are finished.

    Raises:
        UserError: If a file cannot be written.
    """
    best = best_trial(results, num_seeds=num_seeds)
    text = sweep_table(results, num_seeds=num_seeds)
    if best is not None:
        text += f"\n\nBest mean validation accuracy: {best.name}"
    content = {"trials": [_figures(result) for result in results], "best": best.name if best else None}
    write_json(content, out / "results.json")
    try:
        write_whole(out / "results.md", lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}); use a writable directory") from None
    return text


def _accuracies(result: RunResult) -> tuple[Any, Any]:
    summary = result.summary
    if "accuracy_best" in summary:
        return summary.get("accuracy_best_val"), summary["accuracy_best"]
    validations = [line for line in result.curve if line["split"] == "val"]
    return validations[-1].get("accuracy") if validations else None, summary["accuracy"]


def _percent(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return ""
    mean = f"{100 * statistics.fmean(accuracies):.2f}"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else mean


def _figures(result: TrialResult) -> dict[str, Any]:
    runs = [{**asdict(run), "directory": str(run.directory)} for run in result.runs]
    figures = {f"{split}_accuracy": _statistics(result.accuracies(split)) for split in ("val", "test")}
    return {"name": result.name, "settings": dict(result.settings), "n": len(runs), **figures, "runs": runs}


def _statistics(accuracies: Sequence[float]) -> dict[str, float | None] | None:
    if not accuracies:
        return None
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {"mean": statistics.fmean(accuracies), "std": deviation}
