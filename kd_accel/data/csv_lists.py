"""Lists of image files and their labels, as CSV files with a header.

Input: path of a CSV file, or its columns. Output: columns by name, and labels as integers, if all are, or strings.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_accel.errors import UserError, describe_error

Columns = Mapping[str, Sequence[str]]

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_DELIMITERS = ",;\t"


def read_columns(path: Path) -> Columns:
    """Read a CSV file, separated by commas, semicolons or tabs.

    Returns:
        The values of each row, by the name of the column.

    Raises:
        UserError: If the file cannot be read, or a row has another number of values than the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=header.count)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"data.source: cannot read {path} ({describe_error(error)}); it must be a CSV file, encoded as UTF-8"
        ) from None
    names = rows[0] if rows else []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise UserError(
                f"data.source: row {number} of {path} has {len(row)} values, but the header has {len(names)}; fix the row (a "
                "value that contains the separator must be in double quotes)"
            )
    columns = zip(*rows[1:], strict=True) if len(rows) > 1 else [()] * len(names)
    return dict(zip(names, columns, strict=True))


def column(columns: Columns, name: str, *, setting: str, path: Path) -> Sequence[str]:
    """Return a column. Raises UserError if it is not found; `setting` is the setting that names it, or its only name."""
    if name not in columns:
        raise UserError(f"{setting}: {path} has no column {name!r}; use one of {', '.join(columns)}")
    return columns[name]


def parse_labels(values: Sequence[str], *, as_names: bool = False) -> list[int | str | None]:
    """Return labels as integers if all are decimal integers, else as strings; an empty value is a sample without a label.

    Args:
        values: The labels.
        as_names: Whether they are strings in any case, because those of the training split are.
    """
    # "007" is a name: as an integer it would lose its zeros.
    is_integer = not as_names and all(_INTEGER.fullmatch(value) for value in set(values) if value)
    return [None if not value else int(value) if is_integer else value for value in values]
