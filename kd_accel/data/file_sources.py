"""Sources of image files: folders with one directory per class or a metadata.csv, and CSV lists of paths and labels.

Input: location of a source. Output: its splits. Only the names of the files are held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kd_accel.config.data_schema import DataConfig
from kd_accel.data.csv_lists import Columns, column, parse_labels, read_columns
from kd_accel.data.folders import FileColumn, folder_names, quoted, read_folder, read_images, read_listed
from kd_accel.data.labels import LabelSource, no_labels
from kd_accel.data.source_splits import EncodedSplit, SourceSplit, absolute, existing_directory
from kd_accel.errors import IneffectiveSetting, UserError

_SPLIT_COLUMN = "split"
_USUAL_SPLITS = frozenset({"train", "training", "test", "testing", "val", "validation", "valid", "dev", "eval"})
_METADATA = "metadata.csv"
_ALL = "."


@dataclass(frozen=True)
class FolderSource:
    """Image folder, `DIR/SPLIT/CLASS/IMAGE` or `DIR/SPLIT/metadata.csv`; with `data.test_fraction` also without SPLIT.

    Attributes:
        directory: The directory.
        config: The data settings.
    """

    directory: Path
    config: DataConfig

    @classmethod
    def open(cls, location: str, config: DataConfig) -> FolderSource:
        """Find the splits of an image folder.

        Raises:
            UserError: If the directory is not found, or has no splits and `data.test_fraction` is not set.
        """
        source = cls(existing_directory(location), config)
        if source._is_flat and config.test_fraction is None:
            is_split = source.directory.name.lower() in _USUAL_SPLITS
            above = f" (imagefolder:{source.directory.parent}, perhaps)" if is_split else ""
            raise UserError(
                f"data.train_split: {source.directory} has no folder {config.train_split!r}, but {source._contents}; "
                "if they are the classes, set data.test_fraction (to 0.2, for example) to hold out test samples, else use a "
                f"directory with {config.train_split}/CLASS/IMAGE and {config.test_split}/CLASS/IMAGE files{above}"
            )
        return source

    @cached_property
    def split_names(self) -> Sequence[str]:
        """Names of the splits."""
        return [self.config.train_split] if self._is_flat else folder_names(self.directory)

    @cached_property
    def _is_flat(self) -> bool:
        """True if the directory is that of a single split."""
        names = folder_names(self.directory)
        own = (self.config.train_split, self.config.test_split, self.config.val_split or "")
        usual = {*_USUAL_SPLITS, *map(str.lower, own)}
        has_images = bool(names) or (self.directory / _METADATA).exists()
        return has_images and usual.isdisjoint(name.lower() for name in names)

    @property
    def _contents(self) -> str:
        return quoted(folder_names(self.directory) or [_METADATA])

    def read(self, split: str, *, train: SourceSplit | None) -> EncodedSplit:
        """List the files of a split; see `Source.read`."""
        directory = self.directory if self._is_flat else self.directory / split
        metadata = sorted(path.name for path in directory.glob("metadata.*"))
        if _METADATA in metadata:
            return self._read_listed(directory, split, train)
        if metadata:
            raise UserError(
                f"data.source: {directory} has the file {metadata[0]}, which is not read: convert it to {_METADATA}, or remove "
                f"it if the names of the directories are the classes ({split}/CLASS/IMAGE)"
            )
        if self.config.label_column not in ("label", None):
            raise IneffectiveSetting(
                "data.label_column",
                f"has no effect ({directory} has no {_METADATA}, so its class folders are the labels); leave it out",
            )
        # Without labels, the folders are not classes, and may differ between the splits.
        label_names = None if train is None or self.config.label_column is None else train.label_names
        found = read_folder(directory, split=split, label_names=label_names)
        return self._split(split, found.paths, found.labels, found.notices, label_names=found.label_names)

    def _read_listed(self, directory: Path, split: str, train: SourceSplit | None) -> EncodedSplit:
        path = directory / _METADATA
        columns = read_columns(path)
        names = column(columns, "file_name", setting="data.source", path=path)
        labels = _labels(columns, self.config, path)
        paths, notices = read_listed(directory, names, listed_in=_METADATA)
        values = parse_labels(labels, as_names=_has_names(train))
        return self._split(split, paths, values, notices, more_files=[path])

    def _split(
        self,
        split: str,
        paths: Sequence[str],
        labels: object,
        notices: tuple[str, ...],
        *,
        label_names: tuple[str, ...] | None = None,
        more_files: Sequence[Path] = (),
    ) -> EncodedSplit:
        return EncodedSplit(
            LabelSource("data.source" if label_names else "data.label_column", split),
            labels,
            label_names,
            notices,
            column=FileColumn(paths),
            roots=[absolute(self.directory)],
            files=lambda: [*more_files, *paths],
        )


@dataclass(frozen=True)
class UnlabeledFolder:
    """Image folder without labels: all images below `DIR/SPLIT`, or below `DIR` if no folder in it has the name of a split.

    Attributes:
        directory: The directory.
        config: The data settings.
    """

    directory: Path
    config: DataConfig

    @classmethod
    def open(cls, location: str, config: DataConfig) -> UnlabeledFolder:
        """Find the directory. Raises UserError if it is not found."""
        return cls(existing_directory(location), config)

    @property
    def split_names(self) -> Sequence[str]:
        """Names of the splits."""
        names = folder_names(self.directory)
        return names if any(map(self._is_split, names)) else [_ALL]

    def _is_split(self, name: str) -> bool:
        return name.lower() in {*_USUAL_SPLITS, self.config.train_split.lower()}

    def read(self, split: str, *, train: SourceSplit | None) -> EncodedSplit:
        """List the images of a split; see `Source.read`."""
        directory = self.directory / split
        paths, notices = read_images(directory)
        if others := [name for name in folder_names(self.directory) if split != _ALL and not self._is_split(name)]:
            notices = (
                *notices,
                f"data.unlabeled: only {directory} is read, because of its name, and not {quoted(others)} next to it; if these "
                "are folders of one split, rename it",
            )
        return EncodedSplit(
            LabelSource("data.source", split),
            no_labels(len(paths)),
            None,
            notices,
            column=FileColumn(paths),
            roots=[absolute(self.directory)],
            files=lambda: paths,
        )


@dataclass(frozen=True)
class CsvSource:
    """CSV lists of paths and labels: one file, with a column `split` or a single split, or a directory of one file per split.

    Paths are relative to the directory of the file. They may be absolute: the user has named the list, and vouches for it.

    Attributes:
        files: CSV file of each split; the same file if it has a column `split`.
        config: The data settings.
        columns: Content of the file with a column `split`; None = each split has a file.
    """

    files: dict[str, Path]
    config: DataConfig
    columns: Columns | None = None

    @classmethod
    def open(cls, location: str, config: DataConfig) -> CsvSource:
        """Find the splits of a CSV file or a directory of CSV files. Raises UserError if it is not found or cannot be read."""
        path = Path(location).expanduser()
        if path.is_dir():
            files = {each.stem: each for each in sorted(path.glob("*.csv"))}
            if not files:
                raise UserError(f"data.source: directory {location!r} has no CSV files; check the path")
            return cls(files, config)
        if not path.is_file():
            raise UserError(
                f"data.source: directory or file {location!r} not found; check the path, relative to the working directory"
            )
        columns = read_columns(path)
        if _SPLIT_COLUMN not in columns:
            return cls({config.train_split: path}, config)
        return cls(dict.fromkeys(columns[_SPLIT_COLUMN], path), config, columns)

    @property
    def split_names(self) -> Sequence[str]:
        """Names of the splits."""
        return list(self.files)

    def read(self, split: str, *, train: SourceSplit | None) -> EncodedSplit:
        """List the files of a split; see `Source.read`."""
        path = self.files[split]
        columns = self.columns or read_columns(path)
        names = column(columns, self.config.image_column, setting="data.image_column", path=path)
        labels = _labels(columns, self.config, path)
        if self.columns:
            rows = [row for row, name in enumerate(columns[_SPLIT_COLUMN]) if name == split]
            names, labels = [names[row] for row in rows], [labels[row] for row in rows]
        if not names:
            raise UserError(f"data.source: {path} has no samples of the {split} split; use another split or source")
        directory = absolute(path.parent)
        paths = [os.path.join(directory, name) for name in names]  # noqa: PTH118  (a million Path objects take seconds)
        return EncodedSplit(
            LabelSource("data.label_column", split),
            parse_labels(labels, as_names=_has_names(train)),
            None,
            (),
            column=FileColumn(paths),
            roots=[Path(directory.anchor)],
            files=lambda: [path, *paths],
            selection=(split, self.config.image_column),
        )


def _has_names(train: SourceSplit | None) -> bool:
    """Return whether the labels of the training split are names."""
    return train is not None and any(isinstance(label, str) for label in train.labels)


def _labels(columns: Columns, config: DataConfig, path: Path) -> Sequence[str]:
    """Return the column of the labels; empty values if no labels are read."""
    if config.label_column is None:
        return [""] * len(next(iter(columns.values()), []))
    return column(columns, config.label_column, setting="data.label_column", path=path)
