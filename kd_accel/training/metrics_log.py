"""metrics.jsonl: a line per event, written by one process, and cut back on resume so that each step stands once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

from kd_accel.errors import UserError
from kd_accel.io.files import refused_by_disk
from kd_accel.training.nonfinite import diverged


class Tracker(Protocol):
    """Where metrics go besides the file (report/tracking.py)."""

    def log(self, values: dict[str, Any], *, step: int) -> None: ...


class MetricsLog:
    """Appends to `path` on the main process; on the others it accepts and drops."""

    def __init__(self, path: Path, *, is_main: bool, tracker: Tracker | None = None) -> None:
        self._path = path
        self._tracker = tracker
        self._is_main = is_main

    def start(self, length_bytes: int) -> None:
        """Cut the file to what a checkpoint had seen (0 for a new run)."""
        if not self._is_main:
            return
        with self._path.open("ab") as file:
            if file.tell() < length_bytes:
                raise UserError(
                    f"{self._path}: shorter than the checkpoint remembers ({file.tell()} of {length_bytes} bytes); "
                    "restore it, or start anew in another run directory"
                )
            file.truncate(length_bytes)

    def length_bytes(self) -> int:
        return self._path.stat().st_size if self._is_main and self._path.exists() else 0

    def write(self, values: dict[str, Any]) -> None:
        """One line: step, epoch, split and plain numbers."""
        _refuse_not_finite(values)
        if not self._is_main:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(refused_by_disk(error)) from None
        if self._tracker is not None:
            numbers = {key: value for key, value in values.items() if key not in ("split", "step")}
            self._tracker.log({_axis_name(values["split"], key): value for key, value in numbers.items()}, step=values["step"])


def _axis_name(split: str, key: str) -> str:
    return key if key == "epoch" else f"{split}/{key}"


def _refuse_not_finite(values: dict[str, Any]) -> None:
    """A split that was evaluated; what goes wrong in a training step is told by engine/finite.py."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise diverged(f"{name} is {value} at step {values['step']} ({values['split']})")
