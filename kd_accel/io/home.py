"""Arrays kept between starts under `$KD_ACCEL_HOME` (default ~/.cache/kd_accel). Everything there can be computed again.

A file is a safetensors file with a checksum. A damaged or foreign file counts as absent, and a file that cannot be written is
not kept. Two processes may write the same file: each replaces the complete file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kd_accel.io.files import write_whole
from kd_accel.io.hashing import arrays_digest, settings_digest
from kd_accel.io.tensors import read_tensors

VARIABLE = "KD_ACCEL_HOME"
_CHECKSUM = "checksum"


def home() -> Path:
    """Return the directory, which may not exist yet."""
    return Path(os.environ.get(VARIABLE) or "~/.cache/kd_accel").expanduser()


def load_arrays(name: str) -> dict[str, np.ndarray] | None:
    """Load the arrays of a file, by name.

    Args:
        name: Name of the file below the directory, without its ending.

    Returns:
        The arrays, or None if the file is absent, unreadable or damaged.
    """
    try:
        arrays = {key: tensor.numpy() for key, tensor in read_tensors(_path(name)).items()}
    except (OSError, ValueError, RuntimeError):
        return None
    checksum = arrays.pop(_CHECKSUM, None)
    return arrays if checksum is not None and checksum.tobytes() == _checksum(name, arrays) else None


def keep_arrays(name: str, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Write arrays to a file.

    Args:
        name: Name of the file below the directory, without its ending.
        arrays: The arrays by name.

    Returns:
        Why the file could not be written, or None.
    """
    content = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    content[_CHECKSUM] = np.frombuffer(_checksum(name, content), np.uint8)
    try:
        _path(name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(_path(name), lambda temporary: save_file(content, temporary))
    except Exception as error:
        # safetensors raises its own exception for a full disk.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{VARIABLE}: cannot write in {home()} ({reason})"
    return None


def _path(name: str) -> Path:
    return home() / f"{name}.safetensors"


def _checksum(name: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """Compute a checksum that also belongs to the name, so that a renamed file is not used."""
    parts = {key: f"{array.dtype} {array.shape} {arrays_digest(array)}" for key, array in arrays.items()}
    return bytes.fromhex(settings_digest({"name": name, "arrays": parts}))
