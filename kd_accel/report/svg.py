"""SVG pictures inside a page, with the colors and the font of the page.

In: SVG text as matplotlib writes it, drawn in placeholder colors. Out: one `<svg>` element whose colors are CSS variables, so
that it follows a light or dark page.
"""

from __future__ import annotations

import re
from html import escape

LIGHT_COLORS = ("#2a78d6", "#eb6834", "#1a9a6c", "#8250df", "#d4447f", "#b88700", "#008300", "#d1242f")
DARK_COLORS = ("#58a6ff", "#f0883e", "#3fc296", "#b392f0", "#f778ba", "#e3b341", "#56d364", "#ff7b72")
"""Colors of runs on a white and on a dark background; further runs repeat them with another line style."""
NUM_COLORS = len(LIGHT_COLORS)
INK, MUTED, GRID = "#a1b2c1", "#a1b2c2", "#a1b2c3"
"""Placeholders for text, for axes, and for grid lines."""
RUN_COLORS = tuple(f"#a1b2d{index}" for index in range(NUM_COLORS))
"""Placeholders for the colors of runs."""

_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    color: f"var(--run{index})" for index, color in enumerate(RUN_COLORS)
}
_PLACEHOLDER = re.compile("#a1b2[cd][0-9]")
_FONT = re.compile(r"font-family: [^;\"]*(?=[;\"])")
_ID = re.compile(r' id="([^"]*)"')
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"')
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", re.DOTALL)


def inline_svg(text: str, *, label: str) -> str:
    """Return a picture as an element of a page.

    Args:
        text: SVG file.
        label: Description for readers that do not see it.
    """
    element = _DROPPED.sub("", text[text.index("<svg") :])
    element = _FONT.sub("font-family: inherit", _SIZE.sub(r"\1", element, count=1))
    element = _PLACEHOLDER.sub(lambda match: _VARIABLES[match[0]], element)
    # Several pictures of one page would repeat the names of their parts; those that are referred to are digests.
    element = _ID.sub(lambda match: match[0] if f"#{match[1]}" in element else "", element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).strip()
