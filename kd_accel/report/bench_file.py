"""Figures of a bench file for the rows of a report, as far as they were measured.

In: the JSON file of `kd-accel bench --out`. Out: fields of a `Row`. A benchmark that was stopped lacks batch sizes or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_accel.bench.provenance import model_digest
from kd_accel.errors import UserError, describe_error
from kd_accel.io.files import load_json, read_json
from kd_accel.report.rows import finite

Entry = Mapping[str, Any]
"""Entry of one model in a bench file."""


def read_bench(path: Path) -> dict[str, Any]:
    """Read a bench file.

    Raises:
        UserError: If it is missing or damaged.
    """
    content = read_json(path, remedy="measure the runs first: kd-accel bench RUN ... --out FILE")
    try:
        entries(content)
    except (KeyError, TypeError):
        raise UserError(
            f"--bench {path}: is not a file of kd-accel bench; write one with: kd-accel bench RUN ... --out FILE"
        ) from None
    return content


def entries(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a bench file by the name of the model."""
    return {entry["name"]: entry for entry in content["models"]}


def entry_of(directory: Path, found: Mapping[str, Entry]) -> Entry | None:
    """Return the entry of a run, or that of another run with the same architecture and image size, which costs the same.

    Args:
        directory: Run directory.
        found: Entries of the bench file by name.
    """
    own, architecture = found.get(str(directory)), _architecture(directory)
    if own is not None or architecture is None:
        return own
    return next((entry for name, entry in found.items() if _architecture(Path(name)) == architecture), None)


def _architecture(directory: Path) -> list[Any] | None:
    """Return what decides the cost of a run's network; None without a valid model.json."""
    try:
        card = load_json(directory / "model.json")
        return [card["arch"], card["stem"], card["arch_args"], card["image_size"], len(card["label_names"])]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_other_models(path: Path, content: Mapping[str, Any], directories: Sequence[Path]) -> None:
    """Raise UserError if a bench file lacks the current model of a finished run, or of one with the same architecture.

    A model that was not measured in time may be missing.
    """
    found = entries(content)
    not_measured = content.get("not_measured")
    entries_left = not_measured if isinstance(not_measured, list) else []
    skipped = {str(entry.get("name")) for entry in entries_left if isinstance(entry, dict)}
    missing = [str(run) for run in directories if not _is_current(entry_of(run, found), run, skipped=skipped)]
    if missing:
        names = " ".join(map(str, directories))
        raise UserError(
            f"--bench {path}: lacks the current model of {', '.join(missing)}; measure all runs again, by the same "
            f"paths: kd-accel bench {names} --out {path}"
        )


def bench_figures(entry: Entry, directory: Path) -> dict[str, Any]:
    """Return the fields of a `Row` that a benchmark measures.

    Args:
        entry: Entry of the run.
        directory: Run directory, for a message.

    Raises:
        UserError: If the entry is damaged.
    """
    try:
        return {"macs": int(entry["macs"]), **_latency(entry["latency"])}
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ZeroDivisionError) as error:
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else describe_error(error)
        raise UserError(f"--bench: the entry of {directory} is damaged ({reason}); measure it again") from None


def _is_current(entry: Entry | None, directory: Path, *, skipped: set[str]) -> bool:
    """Return whether an entry is of its run's current model; an entry without a digest counts as current."""
    if entry is None:
        return str(directory) in skipped
    return entry.get("digest") in (None, model_digest(Path(str(entry.get("name", directory)))))


def _latency(latencies: Sequence[Entry]) -> dict[str, Any]:
    """Return latency at batch size 1 and throughput, as far as they were measured."""
    medians_ms = {int(each["batch_size"]): finite(float(each["median_ms"])) for each in latencies}
    figures: dict[str, Any] = {}
    if medians_ms:
        largest = max(medians_ms)
        figures = {"images_per_second": 1000 * largest / (medians_ms[largest] or 0.0), "throughput_batch_size": largest}
    for latency in latencies:
        if int(latency["batch_size"]) == 1:
            # Files of earlier versions lack some of these figures.
            names = {"latency_spread_ms": "spread_ms", "graph_latency_ms": "graph_median_ms"}
            figures |= {"latency_ms": medians_ms[1], **{own: finite(latency.get(name)) for own, name in names.items()}}
    return figures
