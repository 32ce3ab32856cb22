"""HTML elements as text that is escaped by construction: only `Markup` is taken as it is, every other text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Markup(str):
    """HTML that needs no escaping."""

    __slots__ = ()


Child = str | None
"""Content of an element: `Markup`, text to escape, or nothing."""

_VOID = {"img", "meta", "br"}


def element(tag: str, *children: Child, **attributes: str | None) -> Markup:
    """Return an element.

    Args:
        tag: Name of the element.
        *children: Content.
        **attributes: Attributes without those that are None; `class_` is `class`, and `aria_label` is `aria-label`.
    """
    text = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items() if value is not None
    )
    end = "" if tag in _VOID else f"</{tag}>"
    return Markup(f"<{tag}{text}>{joined(*children)}{end}")


def joined(*children: Child) -> Markup:
    """Return elements and texts in turn."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children if child is not None))


def table(head: Sequence[Child], rows: Sequence[Sequence[Child]], *, caption: str, class_: str | None = None) -> Markup:
    """Return a table that scrolls sideways on a narrow screen; the first cell of each row is its head.

    Args:
        head: Heads of the columns.
        rows: Cells of each row; a `Markup` that begins with a cell is a cell of its own.
        caption: Caption for readers that do not see the heading above.
        class_: Class of the table.
    """
    columns = element("tr", *(element("th", cell, scope="col") for cell in head))
    body = [element("tr", *_cells(row), class_="group" if _is_group(row) else None) for row in rows]
    content = element(
        "table",
        element("caption", caption),
        element("thead", columns),
        element("tbody", *body),
        class_=class_,
    )
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


class GroupRow(list[Child]):
    """Cells of the row of a group, which is emphasized."""


def _is_group(row: Sequence[Child]) -> bool:
    return isinstance(row, GroupRow)


def _cells(row: Sequence[Child]) -> list[Markup]:
    first, *others = row
    return [element("th", first, scope="row"), *(_cell(other) for other in others)]


def _cell(content: Child) -> Markup:
    return content if isinstance(content, Markup) and content.startswith("<td") else element("td", content)
