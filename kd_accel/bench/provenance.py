"""Provenance of a bench file: digests of the measured models and the settings, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_accel.config.schema import BenchConfig
from kd_accel.io.files import load_json

TIME_LIMIT = "time_limit_s"
"""Value of `stopped_by` in a file whose measurement was stopped by this setting."""


def model_digest(directory: Path) -> str | None:
    """Compute the SHA-256 digest of a run's model.json and model.safetensors; None if a file cannot be read."""
    digest = hashlib.sha256()
    try:
        for name in ("model.json", "model.safetensors"):
            with (directory / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return None
    return digest.hexdigest()


def is_measured(file: Path, directories: Sequence[Path], config: BenchConfig) -> bool:
    """Return whether a bench file has the figures of exactly these runs, for their current models and with these settings.

    A measurement that was stopped by its time limit counts; one that was stopped by a signal does not.
    """
    try:
        content = load_json(file)
        measured = [(entry["name"], entry["digest"]) for entry in content["models"]]
        settings: Any = content["settings"]
        is_finished = content.get("stopped_by") in (None, TIME_LIMIT)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    expected = [(str(path), model_digest(path)) for path in directories]
    return is_finished and settings == config.model_dump(mode="json") and measured == expected
