"""Files that are whole or not there: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_accel.types import UserError

_TEMPORARY = ".tmp-"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(temporary)`, then rename: a crash or a power cut leaves the old file or the new one, never a part."""

    def write_and_flush(temporary: Path) -> None:
        write(temporary)
        flush(temporary)

    replace_whole(path, write_and_flush)
    flush(path.parent)


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """The same without the flush: safe against a crash of the program, not against one of the machine."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Temporary files, at any depth, of writers that were killed. The caller must be the only writer."""
    for path in directory.rglob(f".*{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


def refused_by_disk(error: OSError) -> str:
    """What to tell of a file that cannot be written or read."""
    place = error.filename or "a file"
    return (
        f"cannot write or read {place} ({error.strerror or error}): make room, see that it may be written, or name another "
        "place; then start the same command again, which goes on from what is whole"
    )


def lock(path: Path, *, first: int = 0, count: int = 1) -> int:
    """Hold bytes of a file until the returned descriptor is closed or the process dies. count: 0 = all from `first` on.

    Raises BlockingIOError where another process holds one of them. Record locks, which network file systems know too.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, "is held by another process", str(path)) from None
        raise
    return descriptor


def unlock(descriptor: int, *, first: int) -> None:
    """Let go of all bytes from `first` on."""
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, first)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Raises UserError where the disk refuses."""
    text = json.dumps(content, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); see that there is space and that it may be written") from None


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Raises UserError, which ends in the remedy, for what is not there or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except ValueError:
        raise UserError(f"{path}: is damaged (no JSON): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged (no JSON object): {remedy}")
    return content


def flush(path: Path) -> None:
    """To the disk itself; of a directory, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_size(count: float) -> str:
    """count: of bytes."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
