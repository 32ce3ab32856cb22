"""Tracking with TensorBoard, through Accelerate's tracker; a failure never stops a training.

Event files lie in `tensorboard/NAME` below `tracking.dir` or the run directory. A resumed training hides the points after its
checkpoint, which it logs again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from accelerate.tracking import TensorBoardTracker as AccelerateTracker

from kd_accel.config.schema import TrackingConfig
from kd_accel.errors import UserError, describe_error


class TensorBoardTracker:
    """Tracker of one run in TensorBoard. `start` it on the main process; without, it logs nothing.

    Args:
        directory: Directory of all runs.
        name: Name of the run.
    """

    def __init__(self, directory: Path, *, name: str) -> None:
        self._directory, self._name = directory, name
        self._writer: Any = None

    def start(self, config: Mapping[str, Any], *, step: int) -> None:
        """Open an event file, and write the config as text.

        Args:
            config: Nested settings of the run.
            step: Optimizer steps that are done; later points of an earlier event file are hidden.
        """

        def open_file() -> None:
            tracker = AccelerateTracker(self._name, self._directory, purge_step=step + 1)
            tracker.start()
            self._writer = tracker.tracker
            self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```", step)

        self._try(open_file)

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Log metrics at an optimizer step."""
        if self._writer is not None:
            self._try(lambda: [self._writer.add_scalar(name, value, step) for name, value in values.items()])

    def finish(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._try(lambda: self._writer.close())
        self._writer = None

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._writer = None
            warnings.warn(f"TensorBoard: tracking stopped ({describe_error(error)}); metrics.jsonl is complete", stacklevel=3)


def refuse_missing_tensorboard(config: TrackingConfig) -> None:
    """Raise UserError if `tracking.tensorboard` is set and tensorboard is not installed."""
    if config.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "tracking.tensorboard: true needs tensorboard, which is not installed; pip install tensorboard, or leave it out"
        )
