"""Figures: what is drawn, names at the points, colors of runs, and SVG for a light and a dark page."""

import re

import numpy as np
from PIL import Image, ImageColor

from kd_accel.report.plots import (
    PANELS,
    Point,
    accuracy_latency_svg,
    learning_curve_svgs,
    plot_accuracy_against_latency,
    plot_learning_curves,
)
from kd_accel.report.svg import LIGHT_COLORS

LINES = [{"step": step, "epoch": step, "split": "train", "loss": 9.0, "ce": 1.0 / step, "lr": 0.1} for step in (1, 2)]
VALIDATION = [{"step": step, "epoch": step, "split": "val", "loss": 1.0, "accuracy": 0.5} for step in (1, 2)]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count(path, color):
    """Count the pixels of a color."""
    return int((pixels(path) == ImageColor.getrgb(color)).all(-1).sum())


def names_of(svg):
    """Return (text, x, y) of the names at the points."""
    found = re.findall(r'<text style="[^"]*fill: var\(--run\d\)" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', svg)
    return [(name, float(x), float(y)) for x, y, name in found]


def test_each_logged_quantity_has_a_figure():
    assert [title for title, _ in learning_curve_svgs([("a", LINES + VALIDATION)])] == [
        "Training cross-entropy",
        "Validation loss",
        "Validation accuracy (%)",
        "Learning rate",
    ]
    distilled = [{**line, "temperature": 4.0, "alpha": 0.9} for line in LINES]
    titles = [title for title, _ in learning_curve_svgs([("a", LINES), ("b", distilled)])]
    assert titles == ["Training cross-entropy", "Learning rate", "Temperature", "Alpha, weight of the teacher"]
    assert learning_curve_svgs([("a", [])]) == []


def test_the_training_curve_is_the_cross_entropy():
    assert PANELS[0].points(LINES) == [(1, 1.0), (2, 0.5)]
    assert PANELS[2].points(VALIDATION) == [(1, 50.0), (2, 50.0)]


def test_a_long_training_is_drawn_with_means():
    lines = [{"step": step, "split": "train", "ce": float(step % 2)} for step in range(1000)]
    points = PANELS[0].points(lines)
    assert len(points) == 250 and {y for _, y in points} == {0.5} and points[-1][0] == 999


def test_runs_have_their_colors_in_all_files(tmp_path):
    curves = [("a", LINES), ("a", [{**line, "ce": 0.1} for line in LINES])]
    plot_learning_curves(curves, tmp_path / "two.png")
    assert all(count(tmp_path / "two.png", color) > 50 for color in LIGHT_COLORS[:2])
    assert count(tmp_path / "two.png", LIGHT_COLORS[2]) == 0
    svgs = [svg for _, svg in learning_curve_svgs(curves)]
    assert all("stroke: var(--run0)" in svg and "stroke: var(--run1)" in svg for svg in svgs)


def test_run_without_a_line_is_plotted(tmp_path):
    plot_learning_curves([("a", [])], tmp_path / "x.png")
    assert pixels(tmp_path / "x.png").shape[2] == 3


def test_overlapping_markers_are_both_visible(tmp_path):
    blue = LIGHT_COLORS[0]
    for name, place in (("together", (1.0, 0.9)), ("apart", (0.2, 0.889))):
        points = [Point("a", 1.0, 0.9, color=0), Point("b", *place, color=1)]
        plot_accuracy_against_latency(points, tmp_path / f"{name}.png")
    assert count(tmp_path / "together.png", blue) > 0.5 * count(tmp_path / "apart.png", blue) > 100


def test_names_at_equal_points_do_not_overlap():
    points = [Point(f"model {index}", 1.0, 0.9, color=index) for index in range(4)]
    places = names_of(accuracy_latency_svg(points))
    assert [name for name, _, _ in places] == [point.name for point in points]
    for index, (_, x, y) in enumerate(places):
        assert all(abs(x - x2) > 10 or abs(y - y2) > 8 for _, x2, y2 in places[index + 1 :])


def test_a_name_stays_inside_of_the_axes():
    svg = accuracy_latency_svg([Point("left", 0.1, 0.5), Point("a very long name of a model", 9.0, 0.9)])
    anchors = [
        dict(re.findall(r"([\w-]+): ([\w-]+)", style))["text-anchor"]
        for style in re.findall(r'style="([^"]*var\(--run0\))" x="[^>]*>[a-z]', svg)
    ]
    assert anchors == ["start", "end"]


def test_bars_are_deviation_and_interquartile_range():
    def lines(**bars):
        return accuracy_latency_svg([Point("a", 1.0, 0.9, **bars), Point("b", 2.0, 0.8)]).count("stroke: var(--run0)")

    assert lines() < lines(spread_ms=0.4) == lines(deviation=0.01) < lines(spread_ms=0.4, deviation=0.01)


def test_names_with_dollars_are_no_formulas():
    assert [name for name, _, _ in names_of(accuracy_latency_svg([Point("$a$ & <b>", 1.0, 0.9)]))] == ["$a$ &amp; &lt;b&gt;"]
