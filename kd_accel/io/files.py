"""Atomic file writes, file locks, and JSON files.

A file is written under a temporary name, flushed to disk and renamed, so that it is either complete or absent.
"""

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
"""Size limit of JSON files: the size of a cache manifest with half a million files. All other JSON files are far smaller."""
_MAX_DEPTH = 64


def is_directory(name: str | Path) -> bool:
    """Return whether a name is that of an existing directory; `Path.is_dir` raises OSError for a name that is too long."""
    return os.path.isdir(name)  # noqa: PTH112


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically and durably: after a crash or a power failure the old or the new file exists, complete.

    Args:
        path: The file to create or replace.
        write: Function that writes the content to the temporary path passed to it.
    """

    def write_and_flush(temporary: Path) -> None:
        write(temporary)
        flush(temporary)

    replace_whole(path, write_and_flush)
    flush(path.parent)


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically without flushing it: unlike `write_whole`, not safe against a crash of the machine."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}{os.getpid()}")
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete the temporary files of killed writers, recursively. The caller must be the only writer in the directory."""
    for path in directory.rglob(f".*{_TEMPORARY}*"):
        if not path.is_dir():
            path.unlink(missing_ok=True)


def refuse_links(directory: Path, *, field: str) -> None:
    """Raise UserError if a directory contains a symbolic link, because writing to the link would overwrite its target.

    The directory itself may be a link. Subdirectories are not searched: their files are replaced, never opened for writing.
    """
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_symlink():
            raise UserError(
                f"{field}: {path} is a symbolic link whose target would be overwritten; replace it with a regular file"
            )


def refused_by_disk(error: OSError) -> str:
    """Return the error message for a file that cannot be written or read."""
    path = error.filename or "a file"
    return (
        f"cannot write or read {path} ({error.strerror or error}); free disk space, check the permissions, or set another "
        "path, then run the same command again: it resumes from the complete files"
    )


def lock(path: Path, *, first: int = 0, count: int = 1) -> int:
    """Lock bytes of a file until the returned descriptor is closed or the process ends.

    POSIX record locks are used, because network file systems support them too.

    Args:
        path: The file; created if it does not exist.
        first: Position of the first byte.
        count: Number of bytes; 0 = all bytes from `first` on.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        BlockingIOError: If another process has locked one of the bytes.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, "is locked by another process", str(path)) from None
        raise
    return descriptor


def unlock(descriptor: int, *, first: int) -> None:
    """Unlock all bytes from `first` on."""
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, first)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file atomically, and create its parent directories.

    Raises:
        UserError: If the file cannot be written.
    """
    text = json.dumps(content, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); free disk space, or check the permissions") from None


def read_json(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        remedy: Last part of the error message.

    Raises:
        UserError: If the file is missing, unreadable, or does not contain a valid JSON object.
    """
    try:
        content = load_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({_describe_parse_error(error)}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged (not a JSON object): {remedy}")
    return content


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a regular file or not valid JSON, or exceeds the limits of size and depth.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {readable_size(MAX_JSON_BYTES)}")
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [content], 0
    while level:
        level = [part for value in level for part in _children(value)]
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
    return content


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _describe_parse_error(error: ValueError) -> str:
    return "not valid JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)[:100]


def flush(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_size(count: float) -> str:
    """Format a number of bytes with a binary unit, for example `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
