"""Record of an acceptance: a line of JSON for each case, in the file as soon as the case has ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Figures of a case. "ok": whether they are as required; True by default."""


@dataclass(frozen=True)
class Record:
    """File to which any process appends.

    Args:
        path: of the file.
        provenance: commit, card and versions, repeated in each line.
    """

    path: Path
    provenance: Mapping[str, Any]

    def add(self, item: str, case: str, figures: Figures, *, seconds: float) -> None:
        """Append the line of a case. seconds: until its figures were known; of commands side by side, the wait for them."""
        own = {"ok": True, **figures}
        line = {"item": item, "case": case, "ok": own.pop("ok"), "seconds": round(seconds, 2), **own, **self.provenance}
        self.append(json.dumps(line))

    def append(self, text: str) -> None:
        """Append a line in a single write, since several processes append to the same file."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, f"{text}\n".encode())
        finally:
            os.close(file)

    def lines(self, *, since_bytes: int = 0) -> list[Figures]:
        """Read the lines from a position on."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(since_bytes)
            return [json.loads(line) for line in file]

    def length_bytes(self) -> int:
        """Return the length of the file."""
        return self.path.stat().st_size if self.path.exists() else 0


@dataclass(frozen=True)
class Setting:
    """Settings of all items.

    Args:
        is_trial: whether everything is run in small on a CPU.
        scratch: directory for runs and caches, removed at the end.
        record: of the figures.
    """

    is_trial: bool
    scratch: Path
    record: Record

    def size(self, real: int, trial: int) -> int:
        """Return the first number, or the second in a trial."""
        return trial if self.is_trial else real
