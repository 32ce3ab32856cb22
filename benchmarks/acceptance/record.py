"""Record of the acceptance test: a line of JSON for each case, written as soon as the case has ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Figures of a case by name. "ok" is whether the case passed; the default is True."""


@dataclass(frozen=True)
class Record:
    """File to which several processes append.

    Args:
        path: Path of the file.
        provenance: Commit, GPU and versions, which are repeated in each line.
    """

    path: Path
    provenance: Mapping[str, Any]

    def add(self, item: str, case: str, figures: Figures, *, seconds: float) -> None:
        """Append the line of a case.

        Args:
            item: Letter of the item.
            case: Name of the case.
            figures: Figures of the case.
            seconds: Time that the case took; if its commands were started earlier, the time of the wait for them.
        """
        passed = figures.get("ok", True)
        rest = {name: figure for name, figure in figures.items() if name != "ok"}
        line = {"item": item, "case": case, "ok": passed, "seconds": round(seconds, 2), **rest, **self.provenance}
        self.append(json.dumps(line))

    def append(self, text: str) -> None:
        """Append a line of text."""
        # A single write with O_APPEND, so that lines of several processes do not mix.
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, f"{text}\n".encode())
        finally:
            os.close(file)

    def lines(self, *, since_bytes: int = 0) -> list[Figures]:
        """Read the lines after a position in the file."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(since_bytes)
            return [json.loads(line) for line in file]

    def length_bytes(self) -> int:
        """Return the length of the file, 0 if it does not exist."""
        return self.path.stat().st_size if self.path.exists() else 0


@dataclass(frozen=True)
class Setting:
    """Settings of all items.

    Args:
        is_trial: Whether everything runs on a CPU with small settings.
        scratch: Directory for runs and caches, removed at the end.
        record: Record of the figures.
    """

    is_trial: bool
    scratch: Path
    record: Record

    def size(self, full: int, trial: int) -> int:
        """Return `trial` in a trial, otherwise `full`."""
        return trial if self.is_trial else full
