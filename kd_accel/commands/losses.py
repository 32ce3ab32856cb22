"""`kd-accel losses`: the registered losses and their settings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from kd_accel.losses.registry import LossDescription, find_losses, losses_table

_WIDTH = 120


def run_losses(name: str | None) -> None:
    """Print the table of losses, or one loss with its settings.

    Args:
        name: Registered name, or `import:package.module:Class`; None = the table.

    Raises:
        UserError: If the name is not that of a loss.
    """
    if name is None:
        print(losses_table())
    else:
        print("\n\n".join("\n".join(_lines(loss, name)) for loss in find_losses(name)))


def _lines(loss: LossDescription, name: str) -> Iterator[str]:
    yield from (f"{name} (between {loss.kind}): {loss.summary}", "")
    batch = "a mean over samples" if loss.per_sample else "computed over the micro-batch of one process"
    mixing = "supported" if loss.supports_mixed_labels else "not supported: each sample needs one true class"
    for title, text in (("formula", loss.formula), ("paper", loss.paper), ("batch", batch), ("mixup, cutmix", mixing)):
        if text:
            yield f"  {title + ':':14} {text}"
    yield "  settings (args):" if loss.settings else "  settings: none"
    for setting, default, description in loss.settings:
        given = "required" if default is None else f"default {default}"
        yield textwrap.fill(f"{setting}  ({given}) {description}", _WIDTH, initial_indent="    ", subsequent_indent=" " * 8)
