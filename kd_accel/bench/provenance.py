"""What a bench file was made from, so that its figures are not taken for those of other models or other settings. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_accel.config.schema import BenchConfig
from kd_accel.io.files import load_json


def model_digest(directory: Path) -> str | None:
    """Of the files that a run leaves to be deployed; None where they are not."""
    digest = hashlib.sha256()
    try:
        for name in ("model.json", "model.safetensors"):
            with (directory / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError:
        return None
    return digest.hexdigest()


def is_measured(file: Path, directories: Sequence[Path], config: BenchConfig) -> bool:
    """Whether `file` holds figures of just these runs, as they are now, taken with these settings."""
    try:
        content = load_json(file)
        measured = [(entry["name"], entry["digest"]) for entry in content["models"]]
        settings: Any = content["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return settings == asdict(config) and measured == [(str(path), model_digest(path)) for path in directories]
