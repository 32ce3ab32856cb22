"""Tables of images as Arrow files: the Hugging Face Hub, Parquet files, and data sets saved by `datasets`.

Input: the kind and location of a source. Output: its splits, each a table with a column of undecoded images and a column of
labels. The tables are memory-mapped, so their size is not limited by the memory.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kd_accel.config.data_schema import DataConfig
from kd_accel.data.folders import quoted
from kd_accel.data.labels import LabelSource, no_labels
from kd_accel.data.source_splits import EncodedSplit, SourceSplit, absolute
from kd_accel.errors import UserError, describe_error

KINDS = ("hub", "parquet", "disk")
_USUAL_SPLITS = frozenset({"train", "test", "val", "validation", "valid", "dev"})


@dataclass(frozen=True)
class TableSource:
    """Source of one table per split.

    Attributes:
        config: The data settings.
        tables: Function that loads a split as a `datasets.Dataset`, by the name of the split.
        roots: Absolute paths of the directories that may contain image files; a relative path is relative to the first.
    """

    config: DataConfig
    tables: Mapping[str, Callable[[], Any]]
    roots: Sequence[Path]

    @classmethod
    def open(cls, kind: str, location: str, config: DataConfig) -> TableSource:
        """Find the splits of a source.

        Args:
            kind: Kind of the source, one of `KINDS`.
            location: Repository, directory or files, the part of `data.source` after the colon.
            config: The data settings.

        Raises:
            UserError: If the source is not found or cannot be read.
        """
        _import_datasets(config)
        root, tables = {"hub": _hub, "parquet": _parquet, "disk": _disk}[kind](location, config)
        return cls(config, tables, [*([absolute(root)] if root else []), *_caches()])

    @property
    def split_names(self) -> Sequence[str]:
        """Names of the splits."""
        return list(self.tables)

    def read(self, split: str, *, train: SourceSplit | None) -> EncodedSplit:
        """Read a split; see `Source.read`."""
        try:
            table = self.tables[split]()
        except UserError:
            raise
        except Exception as error:
            # Each reader raises its own exceptions on damaged or unreachable files.
            raise _unreadable(self.config, error.__cause__ or error) from None
        return table_split(table, LabelSource("data.label_column", split), self.config, roots=self.roots)


def table_split(table: Any, origin: LabelSource, config: DataConfig, *, roots: Sequence[Path]) -> EncodedSplit:
    """Take the images and labels from a table.

    Args:
        table: A `datasets.Dataset`.
        origin: Name of the split, and the setting that its labels come from.
        config: The data settings; `image_column` and `label_column` are used.
        roots: Absolute paths of the directories that may contain image files.

    Raises:
        UserError: If the table has no samples, or lacks one of the columns.
    """
    split = origin.split
    if not len(table):
        raise _no_samples(config, split)
    for setting in ("image_column", "label_column"):
        if getattr(config, setting) not in (None, *table.column_names):
            raise UserError(
                f"data.{setting}: the {split} split has no column {getattr(config, setting)!r}; use one of "
                f"{', '.join(table.column_names)}"
            )
    images, label_column = _undecoded(table, config.image_column, split=split), config.label_column
    names = getattr(table.features.get(label_column), "names", None)
    return EncodedSplit(
        origin,
        no_labels(len(table)) if label_column is None else _column(table, label_column),
        None if names is None else tuple(names),
        (),
        column=images,
        roots=roots,
        files=partial(_files_behind, table, images, roots[0]),
        selection=(split, config.image_column),
    )


def _undecoded(table: Any, column: str, *, split: str) -> Any:
    """Return a table with the single column `image` of undecoded images."""
    import datasets

    images = table.select_columns([column]).with_format(None)
    images = images if column == "image" else images.rename_columns({column: "image"})
    try:
        return images.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        raise UserError(
            f"data.image_column: column {column!r} of the {split} split does not contain images ({describe_error(error)}); "
            "use another column"
        ) from None


def _column(table: Any, column: str) -> Any:
    """Return a column as an Arrow array."""
    return table.data.column(column) if table._indices is None else table.with_format("arrow")[column][:]


def _files_behind(table: Any, images: Any, root: Path) -> list[str]:
    """Return the paths of the Arrow files of a table, then those of its image files."""
    import pyarrow.compute as pc

    cells = _column(images, "image")
    is_path = pc.is_null(pc.struct_field(cells, "bytes"))
    paths = pc.struct_field(cells, "path").filter(is_path).drop_null().to_pylist() if pc.any(is_path).as_py() else []
    return [*(file["filename"] for file in table.cache_files), *(str(root / path) for path in paths)]


def _caches() -> list[Path]:
    """Return the directories of `datasets` and the Hub that may contain image files."""
    import datasets.config
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    return [absolute(Path(path)) for path in caches]


def _import_datasets(config: DataConfig) -> None:
    """Import Hugging Face `datasets`, which only some sources use. Raises UserError if it is not installed."""
    try:
        import datasets

        # Fails for a directory `datasets` in the working directory, which Python imports as an empty package.
        from datasets import load_dataset as load_dataset
    except ImportError as error:
        raise UserError(
            f"data.source: {config.source} needs the package datasets ({error}); pip install datasets, or use a source "
            "that works without it (imagefolder:DIR, csv:FILE, import:MODULE:FUNCTION)"
        ) from None
    datasets.disable_progress_bars()


_Tables = tuple[Path | None, Mapping[str, Callable[[], Any]]]
"""(directory of the source, function that loads a split by its name)."""


def _hub(location: str, config: DataConfig) -> _Tables:
    import datasets

    name, _, revision = location.partition("@")
    directory = Path(location).expanduser()
    if directory.is_dir():
        path = str(absolute(directory))
        try:
            splits = datasets.get_dataset_split_names(path)
        except Exception as error:
            # Each reader raises its own exceptions.
            raise _unreadable(config, error.__cause__ or error) from None
        return directory, {split: partial(datasets.load_dataset, path, split=split) for split in splits}
    splits = _hub_splits(name, revision or None)
    return None, {split: partial(datasets.load_dataset, name, split=split, revision=revision or None) for split in splits}


def _hub_splits(name: str, revision: str | None) -> list[str]:
    """Return the names of the available splits.

    Raises:
        UserError: If the repository cannot be reached, or the local copy has another revision than the settings. Without
            network access `datasets` uses its newest local copy, regardless of the revision.
    """
    import datasets

    try:
        splits = datasets.get_dataset_split_names(name, revision=revision)
        builder = datasets.load_dataset_builder(name, revision=revision) if revision else None
    except Exception as error:
        # Each HTTP client raises its own exceptions without network access or for an unknown name.
        raise UserError(
            f"data.source: cannot reach hub:{name} ({describe_error(error)}); check the name and the network access, or use "
            "a local copy (parquet:DIR)"
        ) from None
    is_local_copy = type(builder).__module__.startswith("datasets.packaged_modules.cache.")
    if builder is not None and is_local_copy and builder.hash != revision:
        raise UserError(
            f"data.source: cannot reach hub:{name}, and the newest local copy is revision {builder.hash}, not {revision}; "
            "check the network access, set that revision, or use another local copy (parquet:DIR)"
        )
    return splits


def _disk(location: str, config: DataConfig) -> _Tables:
    import datasets

    directory = Path(location).expanduser()
    if not directory.is_dir():
        raise UserError(f"data.source: directory {location!r} not found; check the path, relative to the working directory")
    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise UserError(
            f"data.source: {location!r} is not a data set of datasets' save_to_disk ({describe_error(error)}); use parquet:DIR "
            "for Parquet files, hub:DIR for a copy of a repository"
        ) from None
    by_split = dict(saved) if isinstance(saved, datasets.DatasetDict) else {config.train_split: saved}
    return directory, {str(split): partial(_identity, table) for split, table in by_split.items()}


def _identity(table: Any) -> Any:
    return table


def _parquet(location: str, config: DataConfig) -> _Tables:
    root, paths = _parquet_files(location)
    expected = {*_USUAL_SPLITS, config.train_split, config.val_split, config.test_split}
    files: dict[str, dict[Path, list[str]]] = {}
    for path in paths:
        split, within = _split_and_directory(path.relative_to(root), expected)
        files.setdefault(split, {}).setdefault(within, []).append(str(path))
    for split, by_directory in files.items():
        if len(by_directory) > 1 and Path(location).expanduser().is_dir():
            raise UserError(
                f"data.source: {config.source} has files of the {split} split in several directories "
                f"({quoted(list(map(str, by_directory)))}); name one of them, as parquet:{root / next(iter(by_directory))}"
            )
    return root, {split: partial(_load_parquet, sum(found.values(), []), split, config) for split, found in files.items()}


def _parquet_files(location: str) -> tuple[Path, list[Path]]:
    """Return the directory to which paths are relative, and the Parquet files of a directory, file or pattern."""
    path = Path(location).expanduser()
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        # The layouts of a repository: DIR/*.parquet, DIR/data/*.parquet, or DIR/CONFIG/SPLIT/*.parquet.
        for pattern in ("*.parquet", "data/*.parquet", "**/*.parquet"):
            if found := [each for each in sorted(path.glob(pattern)) if not _is_hidden(each.relative_to(path))]:
                return path, found
        raise UserError(f"data.source: directory {location!r} has no Parquet files; check the path")
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207  (pathlib refuses absolute patterns)
    if not matches:
        raise UserError(
            f"data.source: directory or file {location!r} not found; check the path, relative to the working directory"
        )
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    return root, matches


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_and_directory(path: Path, expected: Collection[str | None]) -> tuple[str, Path]:
    """Return the split that a Parquet file belongs to, and the directory, without that of the split, in which the file is.

    The split is the word in the file's name, else the directory, that is the name of a split: `train-00000-of-00002.parquet`,
    `default/train/0000.parquet`. Without such a word it is the beginning of the file's name.
    """
    for word in re.split(r"[-._ ]", path.name):
        if word in expected:
            return word, path.parent
    for position, part in enumerate(path.parts[:-1]):
        if part in expected:
            return part, Path(*path.parts[:position])
    return path.name.split(".")[0].split("-")[0], path.parent


def _load_parquet(paths: list[str], split: str, config: DataConfig) -> Any:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # `datasets` raises an error for a file without samples.
        kept = [glob.escape(path) for path in paths if pq.read_metadata(path).num_rows]
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(config, error) from None
    if not kept:
        raise _no_samples(config, split)
    return datasets.load_dataset("parquet", data_files={"train": kept}, split="train")


def _unreadable(config: DataConfig, error: BaseException) -> UserError:
    return UserError(f"data.source: cannot read {config.source} ({describe_error(error)}); check that its files are intact")


def _no_samples(config: DataConfig, split: str) -> UserError:
    return UserError(f"data.source: the {split} split of {config.source} has no samples; use another split or source")
