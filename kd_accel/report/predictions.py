"""Predictions as a Parquet file, one row for each sample or file.

Input: columns of arrays and names. Output: one file, complete or absent. Its schema has the class names in the order of the
probabilities: the metadata `label_names` is JSON, {run: [name, ...]}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd_accel.errors import UserError
from kd_accel.io.files import write_whole

_ENDING = ".parquet"


def check_predictions_file(path: Path) -> None:
    """Check the file of `--out` before the work.

    Raises:
        UserError: If its name does not end with .parquet, it is a directory, or pyarrow is not installed.
    """
    if path.suffix != _ENDING:
        raise UserError(f"--out: {path} is not a valid name, because predictions are a Parquet file; end it with {_ENDING}")
    if path.is_dir():
        raise UserError(f"--out: {path} is a directory; use the name of a file")
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("--out: a Parquet file needs pyarrow, which is not installed; pip install pyarrow") from None


def write_predictions(path: Path, tables: Sequence[Mapping[str, Any]], *, label_names: Mapping[str, Sequence[str]]) -> None:
    """Write predictions, atomically, and create the parent directories.

    Args:
        path: The file.
        tables: Columns by name, one table after the other: arrays [N], lists of names (None = null), probabilities [N, C].
        label_names: Class names of each run, in the order of its probabilities.

    Raises:
        UserError: If the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [pa.table({name: _arrow(values) for name, values in columns.items()}) for columns in tables]
    names = {run: list(own) for run, own in label_names.items()}
    table = pa.concat_tables(parts).replace_schema_metadata({"label_names": json.dumps(names)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: pq.write_table(table, temporary))
    except OSError as error:
        raise UserError(
            f"--out: cannot write {path} ({error.strerror or error}); free disk space, check the permissions, or use another "
            "file"
        ) from None


def _arrow(values: Any) -> Any:
    """Return a column as an Arrow array. Bytes of a file name that are not UTF-8 are written as escapes."""
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        texts = [None if text is None else os.fsencode(text).decode("utf-8", "backslashreplace") for text in values]
        return pa.array(texts, pa.string())
    if values.ndim == 1:
        return pa.array(values)
    offsets = np.arange(len(values) + 1, dtype=np.int64) * values.shape[1]
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))
