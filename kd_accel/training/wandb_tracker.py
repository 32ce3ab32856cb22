"""Tracking with Weights & Biases, online or offline; a failure of W&B never stops a training.

A W&B run is started through Accelerate's tracker. If an online start fails or times out, the run is tracked offline. The first
failure after the start ends the tracking with a warning. wandb is imported only if a run is tracked.
"""

from __future__ import annotations

import netrc
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from kd_accel.config.schema import TrackingConfig
from kd_accel.errors import UserError, describe_error

Mode = Literal["online", "offline", "disabled"]


class WandbTracker:
    """Tracker of one W&B run. Create it on every rank and `start` it on the main process; other ranks log nothing.

    Args:
        config: Settings of the tracking.
        run_dir: Run directory, in which W&B writes `wandb/`.
        name: Display name.
        role: Job type of the W&B run: teacher, student or distilled.
        run_id: Id of a W&B run to resume; None = a new id.
    """

    def __init__(self, config: TrackingConfig, *, run_dir: Path, name: str, role: str, run_id: str | None = None) -> None:
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._config = config
        self._run_dir = run_dir
        self._name = name
        self._role = role
        self._run: Any = None

    @property
    def is_enabled(self) -> bool:
        """True if this process tracks metrics."""
        return self._run is not None

    def start(self, init: Callable[[dict[str, Any]], Any]) -> None:
        """Start the W&B run, online or offline as configured; after a failure offline, then not at all, each with a warning.

        Args:
            init: Function that starts a W&B run with the given keyword arguments of `wandb.init`, and returns it.
        """
        mode = choose_mode(self._config)
        if mode == "disabled":
            return
        for attempt in ("online", "offline") if mode == "online" else ("offline",):
            try:
                self._run = init(self.init_arguments(attempt))
                self._define_axes()
                return
            except Exception as error:
                self._stop(error, f"{attempt} tracking failed" + ("; tracking offline" if attempt == "online" else ""))
                _tear_down()

    def init_arguments(self, mode: str) -> dict[str, Any]:
        """Return the arguments of `wandb.init` except project and config, which Accelerate adds."""
        import wandb

        return {
            "mode": mode,
            "id": self.run_id,
            "resume": "allow",
            "name": self._name,
            "entity": self._config.entity,
            "group": self._config.group,
            "job_type": self._role,
            "tags": list(self._config.tags),
            "dir": str(self._run_dir),
            "settings": wandb.Settings(init_timeout=self._config.timeout_s, console="off", quiet=True),
        }

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """Log metrics at an optimizer step."""
        self._try(lambda: self._run.log({**values, "step": step}, step=step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""

        def send() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._try(send)

    def finish(self) -> None:
        """End the W&B run."""
        self._try(lambda: self._run.finish())
        self._run = None

    def _define_axes(self) -> None:
        """Set the x-axis of plots: the step for training metrics, the epoch for those of evaluations."""
        self._run.define_metric("step")
        self._run.define_metric("epoch")
        self._run.define_metric("train/*", step_metric="step")
        self._run.define_metric("val/*", step_metric="epoch", summary="max")
        self._run.define_metric("test/*", step_metric="epoch")

    def _try(self, action: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._stop(error, "tracking stopped")

    def _stop(self, error: Exception, what: str) -> None:
        self._run = None
        warnings.warn(f"W&B: {what} ({describe_error(error)}); metrics.jsonl is complete", stacklevel=3)


def _tear_down() -> None:
    """End W&B's service process, which refuses a second start with the id of a run that could not start."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def refuse_missing_package(config: TrackingConfig) -> None:
    """Raise UserError if `tracking.wandb` is online or offline and wandb is not installed."""
    if config.wandb in ("online", "offline") and not _is_installed():
        raise UserError(
            f"tracking.wandb: {config.wandb} needs wandb, which is not installed; pip install wandb, or set tracking.wandb to "
            "disabled"
        )


def missing_package_notices(config: TrackingConfig) -> list[str]:
    """Return a notice if the run would be tracked but wandb is not installed, else an empty list."""
    if _is_installed() or _requested_mode(config) == "disabled":
        return []
    return ["wandb is not installed; metrics go to metrics.jsonl only"]


def tracker_name(config: TrackingConfig) -> str | None:
    """Return the tracker to request from Accelerate, or None, as Accelerate warns about a tracker that is not installed."""
    return None if choose_mode(config) == "disabled" else "wandb"


def choose_mode(config: TrackingConfig) -> Mode:
    """Return the tracking mode: the requested mode, or disabled if wandb is not installed."""
    return _requested_mode(config) if _is_installed() else "disabled"


def _requested_mode(config: TrackingConfig) -> Mode:
    """Return the requested mode; auto is WANDB_MODE if set, else online with an API key and offline without, never a prompt."""
    if config.wandb != "auto":
        return config.wandb
    setup = os.environ.get("WANDB_MODE", "").lower()
    if setup in ("online", "offline", "disabled"):
        return setup  # type: ignore[return-value]
    return "online" if _has_key() else "offline"


def _is_installed() -> bool:
    """Return whether the wandb distribution is installed."""
    # An import is not a test: a directory `wandb/` of earlier runs can be imported as a namespace package.
    try:
        version("wandb")
    except PackageNotFoundError:
        return False
    return True


def _has_key() -> bool:
    """Return whether an API key is in the environment or in the netrc file, where `wandb login` stores it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
