"""The HTML page of a report: results, accuracy against latency, and learning curves, in one file without scripts or network.

In: `Report`. Out: text of the page. The parts on classes and on settings are in `page_classes.py` and `page_settings.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from kd_accel.report.columns import Column, shown_columns
from kd_accel.report.content import Report
from kd_accel.report.gain import gains
from kd_accel.report.groups import Group
from kd_accel.report.html import Child, GroupRow, Markup, element, joined, table
from kd_accel.report.page_classes import class_sections
from kd_accel.report.page_settings import hardware_section, settings_section
from kd_accel.report.run_files import RunResult, mapping
from kd_accel.report.settings_table import without_machine_paths
from kd_accel.report.style import style_sheet
from kd_accel.report.svg import NUM_COLORS
from kd_accel.report.tables import REFERENCE_TITLE, groups_by_last_run, has_reference, reference

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Policy with which a browser refuses every script and every request of the page."""
_NO_MATPLOTLIB = "Figures are left out, because matplotlib was not installed when this page was made."


def page(report: Report) -> str:
    """Return the page of a report."""
    title = "Report: " + ", ".join(dict.fromkeys(result.row.name for result in report.results))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style_sheet())),
    )
    sections = (
        _results_section(report),
        _latency_section(report),
        _curves_section(report),
        *class_sections(report),
        settings_section(report),
        hardware_section(report),
    )
    body = element("body", _header(report), element("main", *sections), element("footer", "Made by kd-accel report."))
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def _header(report: Report) -> Markup:
    unfinished = sum(not result.is_finished for result in report.results)
    facts = [("Runs", f"{len(report.results)}" + (f", {unfinished} of them unfinished" if unfinished else ""))]
    facts += _data_facts([result for result in report.results if result.is_finished])
    entries = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    return element("header", element("h1", "Distillation report"), element("dl", *entries, class_="facts"))


def _data_facts(finished: Sequence[RunResult]) -> list[tuple[str, str]]:
    """Return what the runs have in common in their data; different values are listed."""
    values: dict[str, list[str]] = {}
    for result in finished:
        data = mapping(result.summary.get("data"))
        found = {
            "Data": result.summary.get("source"),
            "Classes": len(result.class_names) or None,
            "Training samples": data.get("train_samples"),
            "Test samples": mapping(data.get("test")).get("samples"),
        }
        for name, value in found.items():
            values.setdefault(name, []).extend([] if value is None else [without_machine_paths(str(value))])
    return [(name, ", ".join(dict.fromkeys(shown))) for name, shown in values.items() if shown]


def _results_section(report: Report) -> Markup:
    rows = [result.row for result in report.results]
    columns = shown_columns(rows, keeps_fixed=False)
    with_reference = has_reference(report.results)
    means = groups_by_last_run(report.groups)
    body: list[Sequence[Child]] = []
    for position, result in enumerate(report.results):
        extra = [reference(result)] if with_reference else []
        body.append([_model_cell(report, position), *(column.cell(result.row) for column in columns), *extra])
        if position in means:
            body.append(_group_row(means[position], columns, extra))
    head = ["Model", *(column.title for column in columns), *([REFERENCE_TITLE] if with_reference else [])]
    return element(
        "section",
        element("h2", "Results"),
        table(head, body, caption="Results by run", class_="results"),
        *(element("p", text, class_="gain") for text in gains(report.groups)),
        _explanations(columns, has_groups=bool(means)),
    )


def _model_cell(report: Report, position: int) -> Markup:
    result = report.results[position]
    row = result.row
    seed = "" if row.seed is None else f", seed {row.seed}"
    chips = [element("span", row.role, class_="chip")]
    if row.status:
        chips.append(element("span", row.status, class_="chip unfinished"))
    swatch = element("span", class_="swatch", style=f"--color:var(--run{position % NUM_COLORS})")
    return joined(swatch, report.labels[position], " ", *chips, element("small", f"{row.arch}{seed}, {row.run}"))


def _group_row(group: Group, columns: Sequence[Column], extra: Sequence[str]) -> GroupRow:
    name = joined(group.name, element("small", f"mean ± standard deviation, n = {len(group.rows)}"))
    return GroupRow([name, *(column.group_cell(group) for column in columns), *([""] if extra else [])])


def _explanations(columns: Sequence[Column], *, has_groups: bool) -> Markup:
    terms = [(column.title, column.explanation) for column in columns if column.explanation]
    if has_groups:
        terms.append(("Mean ± standard deviation", "of runs whose settings are equal except the seed (n - 1)"))
    return element("dl", *(part for term in terms for part in (element("dt", term[0]), element("dd", term[1]))), class_="terms")


def _latency_section(report: Report) -> Markup:
    heading = element("h2", "Accuracy against latency")
    if report.figures is None:
        return element("section", heading, element("p", _NO_MATPLOTLIB, class_="note"))
    if report.figures.scatter is None:
        text = "No run has an accuracy and a latency at batch size 1. Measure with kd-accel bench RUN ... --out FILE, and add "
        return element("section", heading, element("p", text, element("code", "--bench FILE"), class_="note"))
    caption = (
        "Vertical bars: standard deviation over seeds. Horizontal bars: interquartile range of the latency. A group of seeds "
        "is one point, its mean."
    )
    figure = element("figure", Markup(report.figures.scatter), element("figcaption", caption), class_="scatter")
    return element("section", heading, figure)


def _curves_section(report: Report) -> Markup:
    heading = element("h2", "Learning curves")
    if report.figures is None:
        return element("section", heading, element("p", _NO_MATPLOTLIB, class_="note"))
    legend = element("ul", *(_legend_entry(label, index) for index, label in enumerate(report.labels)), class_="legend")
    curves = [element("figure", element("h3", title), Markup(svg)) for title, svg in report.figures.curves]
    if not curves:
        return element("section", heading, element("p", "The runs have logged no metrics yet.", class_="note"))
    return element("section", heading, legend, element("div", *curves, class_="curves"))


def _legend_entry(label: str, index: int) -> Markup:
    dashes = (None, "7 4", "2 3", "7 3 2 3")[index // NUM_COLORS % 4]
    style = f"stroke:var(--run{index % NUM_COLORS});stroke-width:3"
    line = element("line", x1="0", y1="5", x2="26", y2="5", style=style, stroke_dasharray=dashes)
    return element("li", element("svg", line, viewBox="0 0 26 10", aria_hidden="true"), label)
