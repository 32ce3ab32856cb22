"""Parts of the page on settings that differ, and on the hardware and the versions of benchmark and trainings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kd_accel.report.bench_file import Entry, entries, entry_of
from kd_accel.report.content import Report
from kd_accel.report.html import Child, Markup, element, joined, table
from kd_accel.report.run_files import RunResult, mapping
from kd_accel.report.settings_table import differing_settings, without_machine_paths

_COMMIT_LETTERS = 10


def settings_section(report: Report) -> Markup:
    """Return the table of the settings in which runs differ."""
    differing = differing_settings(report.results)
    heading = element("h2", "Settings that differ")
    if not differing:
        text = "No setting differs, or the runs have no config.yaml. Name, directory and tracking are not compared."
        return element("section", heading, element("p", text, class_="note"))
    rows = [[element("code", name), *(_value(value) for value in values)] for name, values in differing]
    content = table(["Setting", *report.labels], rows, caption="Settings by run", class_="text wide")
    return element("section", heading, content)


def hardware_section(report: Report) -> Markup:
    """Return the tables of hardware, threads, batch sizes and versions."""
    parts: list[Markup] = []
    if report.bench:
        rows = [[name, value] for name, value in _bench_facts(report.bench)]
        parts += [
            element("h3", "Benchmark"),
            table(["Property", "Value"], rows, caption="Hardware of the benchmark", class_="text"),
        ]
        parts.append(_latency_table(report))
    finished = [(label, result) for label, result in zip(report.labels, report.results, strict=True) if result.is_finished]
    if finished:
        parts += [element("h3", "Trainings"), _trainings_table(finished)]
    return element("section", element("h2", "Hardware and versions"), *parts)


def _value(value: str | None) -> Markup:
    return element("td", None if value is None else element("code", value))


def _bench_facts(bench: dict[str, Any]) -> Iterator[tuple[str, str]]:
    hardware, settings, versions = (mapping(bench.get(name)) for name in ("hardware", "settings", "versions"))
    found = {
        "Device": bench.get("device"),
        "CPU": hardware.get("cpu"),
        "CPU cores": hardware.get("cpus"),
        "GPU": hardware.get("gpu"),
        "Threads": bench.get("threads"),
        "Batch sizes": settings.get("batch_sizes"),
        "Precision": bench.get("precision"),
        "Memory format": bench.get("memory_format"),
        "torch.compile": bench.get("compile"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None) or None,
        "Stopped early by": bench.get("stopped_by"),
    }
    for name, value in found.items():
        if value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else _flag(value)
            yield name, without_machine_paths(shown)


def _flag(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _latency_table(report: Report) -> Markup:
    """Return the latency of each run at each batch size."""
    found = entries(report.bench)
    by_run = [_latencies(entry_of(result.directory, found)) for result in report.results]
    sizes = sorted({size for latencies in by_run for size in latencies})
    if not sizes:
        return element("p", "The bench file has no latencies of these runs.", class_="note")
    rows: list[Sequence[Child]] = [
        [label, *(latencies.get(size) for size in sizes)] for label, latencies in zip(report.labels, by_run, strict=True)
    ]
    note = element("p", "Median latency in milliseconds, and its interquartile range in parentheses.", class_="note")
    head = ["Model", *(f"batch size {size}" for size in sizes)]
    return joined(table(head, rows, caption="Latency in milliseconds by batch size"), note)


def _latencies(entry: Entry | None) -> dict[int, str]:
    """Return the latency at each batch size as text; the entry has been read for the table of results."""
    if entry is None:
        return {}
    return {int(latency["batch_size"]): _milliseconds(latency) for latency in entry["latency"]}


def _milliseconds(latency: dict[str, Any]) -> str:
    spread = latency.get("spread_ms")
    text = f"{float(latency['median_ms']):.2f}"
    return text if not isinstance(spread, int | float) else f"{text} ({spread:.2f})"


def _trainings_table(finished: Sequence[tuple[str, RunResult]]) -> Markup:
    head = ["Model", "Device", "Processes", "Precision", "Steps", "Time (s)", "Images/s", "kd_accel", "torch", "Commit"]
    rows = [[label, *_training_cells(result.summary)] for label, result in finished]
    return table(head, rows, caption="Trainings by run")


def _training_cells(summary: dict[str, Any]) -> list[str]:
    versions = mapping(summary.get("versions"))
    commit = summary.get("commit")
    cells = [summary.get(name) for name in ("device", "world_size", "precision", "steps")]
    cells += [_rounded(summary.get(name)) for name in ("seconds", "images_per_second")]
    cells += [versions.get("kd_accel"), versions.get("torch"), str(commit)[:_COMMIT_LETTERS] if commit else None]
    return ["" if cell is None else without_machine_paths(str(cell)) for cell in cells]


def _rounded(value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.0f}" if is_number else None
