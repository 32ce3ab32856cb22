"""SVG pictures for a page: colors by variables, escaped names, no repeated ids."""

import re

from kd_accel.report.plots import Point, accuracy_latency_svg, learning_curve_svgs
from kd_accel.report.svg import DARK_COLORS, LIGHT_COLORS, inline_svg

LINES = [{"step": step, "epoch": step, "split": "train", "ce": 1.0 / step, "lr": 0.1} for step in (1, 2)]


def test_no_color_of_its_own_but_those_of_the_page():
    svgs = [accuracy_latency_svg([Point("a", 1.0, 0.9, 0.1, 0.01)]), *(svg for _, svg in learning_curve_svgs([("a", LINES)]))]
    for svg in svgs:
        assert re.findall(r"(?:fill|stroke): #\w+", svg) == []
        assert {"var(--muted)", "var(--grid)", "var(--run0)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert len(LIGHT_COLORS) == len(DARK_COLORS)


def test_text_is_text_in_the_font_of_the_page():
    svg = accuracy_latency_svg([Point("a name", 1.0, 0.9)])
    assert ">a name</text>" in svg and ">test accuracy (%)</text>" in svg
    assert set(re.findall(r"font-family: [^;\"]*", svg)) == {"font-family: inherit"}


def test_ids_of_a_page_are_unique():
    svgs = [svg for _, svg in learning_curve_svgs([("a", LINES)])] + [accuracy_latency_svg([Point("a", 1.0, 0.9)])]
    ids = re.findall(r' id="([^"]*)"', " ".join(svgs))
    assert ids and len(ids) == len(set(ids))
    assert all(f'#{name}"' in " ".join(svgs) or f"#{name})" in " ".join(svgs) for name in ids)


def test_the_element_alone_remains_and_its_label_is_escaped():
    text = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="9pt" height="9pt" viewBox="0 0 9 9"><metadata>x</metadata></svg>\n'
    )
    assert inline_svg(text, label='a "b" <c>') == (
        '<svg role="img" aria-label="a &quot;b&quot; &lt;c&gt;" viewBox="0 0 9 9"></svg>'
    )


def test_a_picture_is_the_same_each_time():
    assert accuracy_latency_svg([Point("a", 1.0, 0.9)]) == accuracy_latency_svg([Point("a", 1.0, 0.9)])
