"""Tracking with Weights & Biases, online or offline; a failure of W&B never stops a training.

A W&B run is started through Accelerate's tracker. If an online start fails or times out, the run is tracked offline. The first
failure after the start ends the tracking with a warning. wandb is imported only if a run is tracked.
"""

from __future__ import annotations

import netrc
import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np

from kd_accel.config.schema import TrackingConfig
from kd_accel.config.wandb_sweep import agent_run_id
from kd_accel.errors import UserError, describe_error

Mode = Literal["online", "offline", "disabled"]
_BEST = {"accuracy": "max", "agreement": "max", "loss": "min"}
"""Which value of a validation metric is the best one; the summary has this and the last one."""
_SPLITS = ("train", "val", "test")


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
        self.run_id = run_id or agent_run_id() or uuid.uuid4().hex[:12]
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
        """Return the arguments of `wandb.init` except project and config, which Accelerate adds.

        With None, W&B uses its environment variable, such as WANDB_RUN_GROUP.
        """
        import wandb

        directory = self._config.dir or os.environ.get("WANDB_DIR") or self._run_dir
        Path(directory).mkdir(parents=True, exist_ok=True)
        return {
            "mode": mode,
            "id": self.run_id,
            "resume": "allow",
            "name": None if "WANDB_NAME" in os.environ else self._name,
            "entity": self._config.entity,
            "group": self._config.group,
            "job_type": None if "WANDB_JOB_TYPE" in os.environ else self._role,
            "tags": list(self._config.tags) or None,
            "dir": str(directory),
            "settings": wandb.Settings(init_timeout=self._config.timeout_s, console="off", quiet=True),
        }

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """Log metrics at an optimizer step."""
        self._try(lambda: self._run.log({**values, "step": step}, step=step))

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Add values to the summary of the run, which is a row of W&B's table of runs."""
        self._try(lambda: self._run.summary.update(dict(values)))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Add a table to the summary: in the history, its numbers of rows and columns would be drawn as curves.

        Args:
            name: Name of the table.
            columns: Names of the columns.
            rows: Cells; arrays are images, uint8 [H, W, 3].
        """

        def send() -> None:
            import wandb

            data = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
            self._run.summary[name] = wandb.Table(columns=list(columns), data=data)

        self._try(send)

    def log_files(self, paths: Sequence[Path]) -> None:
        """Log the files of the trained model as an artifact of type `model`."""

        def send() -> None:
            import wandb

            # W&B accepts these characters in the name of an artifact.
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", self._name), type="model")
            for path in paths:
                artifact.add_file(str(path))
            self._run.log_artifact(artifact)

        self._try(send)

    def finish(self) -> None:
        """End the W&B run."""
        self._try(lambda: self._run.finish())
        self._run = None

    def _define_axes(self) -> None:
        """Set the x-axis of plots: the step for training metrics, the epoch for those of evaluations."""
        self._run.define_metric("step")
        self._run.define_metric("epoch")
        for split in _SPLITS:
            self._run.define_metric(f"{split}/samples", summary="none")
        self._run.define_metric("train/*", step_metric="step")
        for name, best in _BEST.items():
            self._run.define_metric(f"val/{name}", step_metric="epoch", summary=f"last,{best}")
        self._run.define_metric("val/*", step_metric="epoch")
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


def project_name(config: TrackingConfig) -> str:
    """Return the W&B project of a run."""
    default = TrackingConfig.model_fields["project"].default
    return (os.environ.get("WANDB_PROJECT") or default) if config.project == default else config.project


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
