"""Weights & Biases, the only place that knows it. It may fail in any way without stopping a training.

The engine starts the run through Accelerate's tracker and hands it over; here is decided in which mode, under which id, and
what happens when W&B does not answer: offline after a short time-out, and silence after a single warning. The package is
imported only for a run that is tracked, so nothing else needs it.
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
from kd_accel.errors import UserError

Mode = Literal["online", "offline", "disabled"]


class WandbTracking:
    """One W&B run. Create it on every rank, `start` it on the main process only; elsewhere logging does nothing."""

    def __init__(
        self, config: TrackingConfig, *, run_dir: Path, name: str, settings: dict[str, Any], run_id: str | None = None
    ) -> None:
        """run_id: of a run that is resumed; a new one is made otherwise. settings: the whole config of the training."""
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._config = config
        self._run_dir = run_dir
        self._name = name
        self._settings = settings
        self._run: Any = None

    @property
    def is_enabled(self) -> bool:
        return self._run is not None

    def start(self, init: Callable[[dict[str, Any]], Any]) -> None:
        """Begin: `init(arguments of wandb.init)` must return the run. Falls back to offline, then to nothing."""
        mode = choose_mode(self._config)
        if mode == "disabled":
            return
        for attempt in ("online", "offline") if mode == "online" else ("offline",):
            try:
                self._run = init(self.init_arguments(attempt))
                self._define_axes()
                return
            except Exception as error:
                self._give_up(error, f"{attempt} tracking failed" + ("; tracking offline" if attempt == "online" else ""))
                _forget_attempt()

    def init_arguments(self, mode: str) -> dict[str, Any]:
        """What Accelerate passes on to wandb.init, besides project and config."""
        import wandb

        return {
            "mode": mode,
            "id": self.run_id,
            "resume": "allow",
            "name": self._name,
            "entity": self._config.entity,
            "group": self._config.group,
            "dir": str(self._run_dir),
            "settings": wandb.Settings(init_timeout=self._config.timeout_s, console="off", quiet=True),
        }

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """Numbers at an optimizer step."""
        self._try(lambda: self._run.log({**values, "step": step}, step=step))

    def log_table(self, name: str, columns: Sequence[str], samples: Sequence[Sequence[Any]]) -> None:
        def send() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(sample) for sample in samples])})

        self._try(send)

    def finish(self) -> None:
        self._try(lambda: self._run.finish())
        self._run = None

    def _define_axes(self) -> None:
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
            self._give_up(error, "tracking stopped")

    def _give_up(self, error: Exception, what: str) -> None:
        self._run = None
        warnings.warn(f"W&B: {what} ({type(error).__name__}: {error}); metrics.jsonl has everything", stacklevel=3)


def _forget_attempt() -> None:
    """W&B's service process holds the id of a run that could not start; it must go before another start under that id."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def refuse_missing_package(config: TrackingConfig) -> None:
    """Raise UserError where the config asks for tracking by name and wandb is not installed."""
    if config.wandb in ("online", "offline") and not _is_installed():
        raise UserError(
            f"tracking.wandb: {config.wandb} needs wandb, which is not installed; pip install wandb, or set tracking.wandb to "
            "disabled"
        )


def missing_package_notices(config: TrackingConfig) -> list[str]:
    """Return a line for the user where a run would be tracked and wandb is not installed, else nothing."""
    if _is_installed() or _requested_mode(config) == "disabled":
        return []
    return ["wandb is not installed; metrics go to metrics.jsonl only"]


def tracker_name(config: TrackingConfig) -> str | None:
    """Return the tracker to request from Accelerate, which warns about one that is not installed."""
    return None if choose_mode(config) == "disabled" else "wandb"


def choose_mode(config: TrackingConfig) -> Mode:
    """Return how a run is tracked here: as it was asked for, or not at all where wandb is not installed."""
    return _requested_mode(config) if _is_installed() else "disabled"


def _requested_mode(config: TrackingConfig) -> Mode:
    """`auto` asks the environment (WANDB_MODE), then whether there is a key; it never prompts."""
    if config.wandb != "auto":
        return config.wandb
    setup = os.environ.get("WANDB_MODE", "").lower()
    if setup in ("online", "offline", "disabled"):
        return setup  # type: ignore[return-value]
    return "online" if _has_key() else "offline"


def _is_installed() -> bool:
    """Look for the distribution: a directory `wandb` of earlier runs can be imported as an empty package."""
    try:
        version("wandb")
    except PackageNotFoundError:
        return False
    return True


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
