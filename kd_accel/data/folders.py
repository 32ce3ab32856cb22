"""Image folders: files at SPLIT/CLASS/**/IMAGE, as torchvision reads them. The class is the first directory below the split.

Input: directory of a split. Output: absolute paths of the images and their labels, in the order of the names, and a description
of the files that are left out. Links to directories and files are followed. An empty class folder is left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd_accel.errors import UserError

_NAMES_OF_ENDINGS = """
    apng avif avifs bmp dib gif j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx pbm pgm png pnm ppm tif tiff webp
"""
ENDINGS = frozenset(f".{name}" for name in _NAMES_OF_ENDINGS.split())
"""Endings of the files that are read; those of `decode.FORMATS`."""

_SYSTEM_FOLDERS = frozenset({"__MACOSX"})
"""Folders that archivers add, with files that only look like images."""

_MAX_NAMED = 5


class FileColumn:
    """Column of image files, read as a column of undecoded images of `datasets`.

    Args:
        paths: Paths of the files, by sample.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    @property
    def paths(self) -> Sequence[str]:
        """Paths of the files, by sample."""
        return self._paths

    def __getitem__(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """Return {"bytes": None, "path": path} of each sample."""
        return [{"bytes": None, "path": self._paths[sample]} for sample in samples]


@dataclass(frozen=True)
class FolderSplit:
    """Images of one split.

    Attributes:
        paths: Paths of the images, by sample.
        labels: Class indices, int64 [N].
        label_names: Class names, by label.
        notices: One line for each kind of folders or files that are left out.
    """

    paths: list[str]
    labels: np.ndarray
    label_names: tuple[str, ...]
    notices: tuple[str, ...]


@dataclass
class _LeftOut:
    """Folders and files without an image, by reason."""

    empty_classes: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def notices(self, where: str) -> tuple[str, ...]:
        """Return one line for each reason."""
        lines = [f"{where}: {_files(count)} left out ({reason})" for reason, count in sorted(self.reasons.items())]
        if self.empty_classes:
            lines.append(f"{where}: class folders without files left out: {quoted(self.empty_classes)}")
        return tuple(lines)


def read_folder(directory: Path, *, split: str, label_names: Sequence[str] | None = None) -> FolderSplit:
    """List the images of a split.

    Args:
        directory: Directory with the class folders.
        split: Name of the split, for messages.
        label_names: Class names of the training split, which are those of the other splits too; None = the names of the class
            folders with files, sorted.

    Raises:
        UserError: If no image is found, the images of a class are all left out, or the split has other classes.
    """
    left_out = _LeftOut()
    by_class = {name: _images(directory / name, left_out) for name in _class_folders(directory, left_out)}
    with_files = {name: paths for name, (paths, num_files) in by_class.items() if num_files}
    left_out.empty_classes = [name for name in by_class if name not in with_files]
    where = f"data.source: {directory}"
    if not with_files:
        raise UserError(
            f"{where} has no class folders with images; it must contain {split}/CLASS/IMAGE files{_hint(left_out.reasons)}"
        )
    if lost := [name for name, paths in with_files.items() if not paths]:
        raise UserError(
            f"{where}: none of the files of the classes {quoted(lost)} is read{_hint(left_out.reasons)}; convert them to "
            "PNG or JPEG, or remove these folders"
        )
    names = tuple(with_files) if label_names is None else tuple(label_names)
    _refuse_other_classes(where, present=by_class, with_files=with_files, expected=names)
    pairs = [(path, label) for label, name in enumerate(names) for path in with_files.get(name, [])]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    return FolderSplit([path for path, _ in pairs], labels, names, left_out.notices(where))


def read_images(directory: Path) -> tuple[list[str], tuple[str, ...]]:
    """List all images below a directory, in folders of any names.

    Returns:
        (absolute paths in the order of the names, one line for each kind of files that are left out).

    Raises:
        UserError: If no image is found.
    """
    left_out = _LeftOut()
    paths, _ = _images(directory, left_out)
    where = f"data.source: {directory}"
    if not paths:
        raise UserError(f"{where} has no images{_hint(left_out.reasons)}; use another directory")
    return paths, left_out.notices(where)


def read_listed(directory: Path, names: Sequence[str], *, listed_in: str) -> tuple[list[str], tuple[str, ...]]:
    """Find the images of a split that a file lists, such as metadata.csv.

    Args:
        directory: Directory of the split.
        names: Paths of the images, relative to the directory.
        listed_in: Name of the file.

    Returns:
        (absolute paths in the order of the list, one line for the files that are left out).

    Raises:
        UserError: If a listed file is not found, or no file is listed.
    """
    where = f"data.source: {directory}"
    if not names:
        raise UserError(f"{where}: {listed_in} lists no files; use another split or source")
    present = {path[len(str(directory)) + 1 :] for path in _walk(str(directory))} - {listed_in}
    listed = [os.path.normpath(name) for name in names]
    if missing := [name for name in dict.fromkeys(listed) if name not in present]:
        raise UserError(
            f"{where}: {_files(len(missing))} of {listed_in} not found ({quoted(missing)}); remove their rows, or restore the "
            "files"
        )
    unlisted = len(present - set(listed))
    left_out = _LeftOut(reasons=Counter({f"not in {listed_in}": unlisted} if unlisted else {}))
    return [_absolute(directory / name) for name in listed], left_out.notices(where)


def folder_names(directory: Path) -> list[str]:
    """Return the names of the folders in a directory, sorted, without hidden ones and those of archivers."""
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    return [name for name in folders if not name.startswith(".") and name not in _SYSTEM_FOLDERS]


def _class_folders(directory: Path, left_out: _LeftOut) -> list[str]:
    """Return the names of the class folders, sorted."""
    names = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if not entry.is_dir():
            left_out.reasons["outside of the class folders"] += 1
        elif entry.name.startswith("."):
            left_out.reasons["in folders whose name begins with a dot"] += sum(1 for _ in _walk(entry.path))
        elif entry.name in _SYSTEM_FOLDERS:
            left_out.reasons[f"in {entry.name}"] += sum(1 for _ in _walk(entry.path))
        else:
            names.append(entry.name)
    return names


def _images(folder: Path, left_out: _LeftOut) -> tuple[list[str], int]:
    """Return the paths of the images of a class, and the number of its files."""
    paths, num_files, root = [], 0, _absolute(folder)
    for path in _walk(root):
        num_files += 1
        reason = _reason_to_leave_out(path[len(root) + 1 :])
        if reason:
            left_out.reasons[reason] += 1
        else:
            paths.append(path)
    return sorted(paths, key=os.path.split), num_files


def _walk(folder: str) -> Iterator[str]:
    """Yield the paths of all files below a folder. A link to a folder above itself is not followed.

    The paths are strings: listing a million images as `Path` objects takes a minute.
    """
    for parent, folders, files in os.walk(folder, followlinks=True):
        above = {os.path.realpath(each) for each in (Path(parent), *Path(parent).parents)}
        folders[:] = [name for name in folders if os.path.realpath(Path(parent, name)) not in above]
        yield from (f"{parent}/{name}" for name in files)


def _reason_to_leave_out(path: str) -> str | None:
    """Return why a file of a class is left out, or None for an image. path: relative to the directory of the class."""
    if path.startswith(".") or "/." in path:
        return "their name, or that of a folder, begins with a dot"
    ending = os.path.splitext(path)[1].lower()  # noqa: PTH122  (see _walk)
    if ending in ENDINGS:
        return None
    return f"files of type {ending}" if ending.strip(".") else "files without an ending"


def _refuse_other_classes(where: str, *, present: Any, with_files: Any, expected: tuple[str, ...]) -> None:
    missing = [name for name in expected if name not in present]
    unknown = [name for name in with_files if name not in expected]
    if missing or unknown:
        parts = [f"missing here: {quoted(missing)}"] if missing else []
        parts += [f"not expected: {quoted(unknown)}"] if unknown else []
        raise UserError(
            f"{where}: the classes differ from those of the training split or the trained model ({'; '.join(parts)}); both "
            "must be the same"
        )


def _absolute(path: Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100  (links are not resolved, as in EncodedImages)


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


def quoted(names: Sequence[str]) -> str:
    """Return the first names in quotes, with escapes for letters that may look like others."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{', '.join(map(ascii, names[:_MAX_NAMED]))}{more}"


def _hint(reasons: Counter[str]) -> str:
    listed = "; ".join(f"{_files(count)} left out ({reason})" for reason, count in sorted(reasons.items()))
    return f"; {listed}" if listed else ""
