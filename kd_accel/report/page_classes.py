"""Parts of the page on classes: accuracy of each class, confusion of classes, and the most confident errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kd_accel.report.content import Report
from kd_accel.report.html import Child, Markup, element, joined, table
from kd_accel.report.svg import NUM_COLORS

if TYPE_CHECKING:
    from kd_accel.report.classes import ClassResults, WorstError

_MAX_CLASSES = 50
"""Largest number of classes that are all listed; of more, the worst."""
_WORST_CLASSES = 10
_MAX_MATRIX = 20
"""Largest number of classes with a confusion matrix; of more, the most frequent confusions."""
_CONFUSIONS = 15
_ERRORS = 16

Named = tuple[int, str, "ClassResults"]
"""Position of a run, its label, and its results by class."""


def class_sections(report: Report) -> Iterator[Markup]:
    """Yield the parts on classes; a sentence in their place if no run has stored predictions."""
    if not any(report.predictions):
        text = "Accuracy by class, confusion and errors are left out: no run has stored predictions (predictions.safetensors)."
        yield element("section", element("h2", "Classes"), element("p", text, class_="note"))
        return
    from kd_accel.report.classes import class_results

    named: list[Named] = []
    for position, stored in enumerate(report.predictions):
        found = class_results(stored, _names(report, position)) if stored else None
        if found is not None:
            named.append((position, report.labels[position], found))
    if named:
        yield _per_class_section(
            named, missing=[label for label in report.labels if label not in {name for _, name, _ in named}]
        )
        yield _confusion_section(named)
    yield _errors_section(report)


def _names(report: Report, position: int) -> list[str]:
    """Return the names of the classes of a run, or numbers."""
    names = report.results[position].class_names
    stored = report.predictions[position]
    if names or stored is None:
        return names
    highest = max(
        (int(each.max()) for each in (stored.predictions.labels, stored.predictions.predicted) if len(each)), default=0
    )
    return [str(number) for number in range(min(highest, 10**5) + 1)]


def _per_class_section(named: Sequence[Named], *, missing: Sequence[str]) -> Markup:
    by_samples: dict[tuple[Any, ...], list[Named]] = {}
    for each in named:
        by_samples.setdefault((*each[2].names, *each[2].samples.tolist()), []).append(each)
    tables = [_per_class_table(runs) for runs in by_samples.values()]
    note = f"Not shown, because they have no stored predictions of labeled samples: {', '.join(missing)}." if missing else None
    return element("section", element("h2", "Accuracy by class"), *tables, element("p", note, class_="note") if note else None)


def _per_class_table(runs: Sequence[Named]) -> Markup:
    names = runs[0][2].names
    accuracies = [each.accuracies for _, _, each in runs]
    order = list(range(len(names)))
    note = None
    if len(names) > _MAX_CLASSES:
        means = {index: _mean([own[index] for own in accuracies]) for index in order}
        order = sorted(order, key=lambda index: means[index])[:_WORST_CLASSES]
        note = element("p", f"The {_WORST_CLASSES} classes of {len(names)} with the lowest mean accuracy.", class_="note")
    head: list[Child] = ["Class", "Test samples", *(_labeled(position, label) for position, label, _ in runs)]
    body = [
        [names[index], str(int(runs[0][2].samples[index])), *(_accuracy_cell(own[index]) for own in accuracies)]
        for index in order
    ]
    return joined(note, table(head, body, caption="Accuracy by class in percent", class_="heat"))


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean of the accuracies of a class; above 1 for a class without samples, which is not among the worst."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else 2.0


def _accuracy_cell(accuracy: float | None) -> Markup | None:
    if accuracy is None:
        return None
    return element("td", f"{100 * accuracy:.1f}", style=f"--tone:var(--bad);--share:{1 - accuracy:.3f}")


def _labeled(position: int, label: str) -> Markup:
    return joined(element("span", class_="swatch", style=f"--color:var(--run{position % NUM_COLORS})"), label)


def _confusion_section(named: Sequence[Named]) -> Markup:
    parts = [
        element("div", element("h3", _labeled(position, label)), _matrix(found) if _is_small(found) else _confusions(found))
        for position, label, found in named
    ]
    text = "Rows: class of a test sample. Columns: predicted class. Numbers: samples." if _is_small(named[0][2]) else None
    return element(
        "section",
        element("h2", "Confusion"),
        element("p", text, class_="note") if text else None,
        element("div", *parts, class_="runs"),
    )


def _is_small(found: ClassResults) -> bool:
    return len(found.names) <= _MAX_MATRIX


def _matrix(found: ClassResults) -> Markup:
    totals = found.samples.tolist()
    rows = [
        [name, *(_count_cell(count, totals[label], label == predicted) for predicted, count in enumerate(counts))]
        for label, (name, counts) in enumerate(zip(found.names, found.confusion.tolist(), strict=True))
    ]
    return table(["", *found.names], rows, caption="Confusion of classes", class_="confusion heat")


def _count_cell(count: int, total: int, is_hit: bool) -> Markup:
    share = count / total if total else 0.0
    tone = "good" if is_hit else "bad"
    return element("td", str(count) if count else "", style=f"--tone:var(--{tone});--share:{share:.3f}" if count else None)


def _confusions(found: ClassResults) -> Markup:
    rows = [[f"{label} → {predicted}", str(count)] for label, predicted, count in found.most_frequent_confusions(_CONFUSIONS)]
    return table(["Class → prediction", "Samples"], rows, caption="Most frequent confusions")


def _errors_section(report: Report) -> Markup:
    from kd_accel.report.classes import worst_errors

    parts: list[Markup] = []
    for position, stored in enumerate(report.predictions):
        errors = list(worst_errors(stored, _names(report, position), _ERRORS)) if stored else []
        if errors:
            heading = element("summary", _labeled(position, report.labels[position]))
            pictures = element("div", *map(_error, errors), class_="errors")
            parts.append(element("details", heading, pictures, open="" if not parts else None))
    if not parts:
        parts = [element("p", "The stored predictions have no errors, or the test samples no labels.", class_="note")]
    text = f"Up to {_ERRORS} test samples of each run that are wrong with the highest probability of the predicted class."
    return element("section", element("h2", "Most confident errors"), element("p", text, class_="note"), *parts)


def _error(error: WorstError) -> Markup:
    teacher = None if error.teacher_prediction is None else joined(element("br"), f"teacher: {error.teacher_prediction}")
    alt = f"Test sample {error.index} of class {error.label}, predicted as {error.prediction}"
    caption = joined(element("b", f"{error.label} → {error.prediction}"), f" {100 * error.score:.1f} %", teacher)
    return element("figure", element("img", src=error.picture, alt=alt, loading="lazy"), element("figcaption", caption))
