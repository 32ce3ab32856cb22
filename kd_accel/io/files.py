"""Files that are whole or not there: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kd_accel.errors import UserError

_TEMPORARY = ".tmp-"
MAX_JSON_BYTES = 64 * 2**20
"""The manifest of a cache of half a million files; everything else that is read here is far smaller."""
_MAX_DEPTH = 64


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
        if not path.is_dir():
            path.unlink(missing_ok=True)


def refuse_links(directory: Path, *, field: str) -> None:
    """Raises UserError for a symbolic link in a directory that is going to be written: its target would be.

    The directory itself may be one, and what lies deeper is replaced, never written through.
    """
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_symlink():
            raise UserError(f"{field}: {path} is a link, and what it points to would be written; remove it, or put it there")


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
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
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
        content = load_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({_reason(error)}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged (no JSON object): {remedy}")
    return content


def load_json(path: Path) -> Any:
    """Raises OSError, or ValueError for what is no JSON, too long, or nested too deeply to be ours."""
    if path.exists() and not path.is_file():
        raise ValueError("no file")
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {readable_size(MAX_JSON_BYTES)}")
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError:
        content = None
        raise ValueError("nested too deeply") from None
    layer, depth = [content], 0
    while layer:
        layer = [part for whole in layer for part in _parts(whole)]
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
    return content


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _reason(error: ValueError) -> str:
    return "no JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)[:100]


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
