"""Settings that name files or directories of this machine, and their absolute form.

A run stores its paths in absolute form, so that it can be evaluated and resumed from any working directory. The settings of a
command stay as they were typed, because messages quote them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_accel.config.fields import as_one_teacher, flatten
from kd_accel.io.files import is_directory

_DIRECTORIES = ("run_dir", "teacher.run", "teacher.cache.dir", "tracking.dir")
_WEIGHTS = ("model.weights", "teacher.weights")
_SOURCES = ("data.source", "data.unlabeled")
_LOCAL_KINDS = ("parquet", "imagefolder", "csv", "disk")
_WEIGHTS_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with each path in absolute form; names of a library or of the Hub are not changed."""

    def absolute(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: absolute(inner, f"{name}.{key}" if name else str(key)) for key, inner in value.items()}
        prefix, path = _prefix_and_path(name, value)
        return value if path is None else f"{prefix}{os.path.abspath(path)}"  # noqa: PTH100  (links are not resolved)

    return {key: absolute(value, str(key)) for key, value in settings.items()}


def moved_paths(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Find the settings whose file or directory was moved: its old place is empty, and the new one has the same name.

    Args:
        before: Nested settings of a run, with absolute paths.
        now: Nested settings of the present command, with absolute paths.

    Returns:
        Dotted names.
    """
    old, new = flatten(before), flatten(now)
    return {name for name in new if _is_moved(name, old.get(name), new[name])}


def is_path_of_weights(weights: str) -> bool:
    """Return whether `weights` names a run directory or a file, and not pretrained weights of a library."""
    return "/" in weights or weights.endswith(_WEIGHTS_FILES) or is_directory(weights)


def _prefix_and_path(name: str, value: Any) -> tuple[str, str | None]:
    """Return the part of a setting's value before a path, and the path; None if the value is not a path."""
    if not isinstance(value, str):
        return "", None
    name = as_one_teacher(name)
    if name in _SOURCES:
        kind, colon, location = value.partition(":")
        # As in data/tables.py, where a directory takes precedence over a repository; only sources may begin with ~.
        expanded = os.path.expanduser(location)  # noqa: PTH111
        is_local = kind in _LOCAL_KINDS or (kind == "hub" and (expanded.startswith((".", "/")) or is_directory(expanded)))
        return f"{kind}{colon}", expanded if is_local and location else None
    is_path = name in _DIRECTORIES or (name in _WEIGHTS and is_path_of_weights(value))
    return "", value if is_path and value else None


def _is_moved(name: str, before: Any, now: Any) -> bool:
    (old_prefix, old), (new_prefix, new) = (_prefix_and_path(name, value) for value in (before, now))
    if old is None or new is None or old == new or old_prefix != new_prefix:
        return False
    return Path(old).name == Path(new).name and not Path(old).exists()
