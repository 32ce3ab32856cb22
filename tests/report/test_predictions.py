"""Predictions as a Parquet file: its columns and metadata, an intact file after a failed write, and refused names."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from kd_accel.errors import UserError
from kd_accel.report.predictions import check_predictions_file, write_predictions

NAMES = {"runs/a": ["cat", "dog"], "runs/b": ["cat", "dog", "f\u00f6x"]}


def table(run, count):
    classes = len(NAMES[run])
    probabilities = np.random.default_rng(classes).random((count, classes), dtype=np.float32)
    return {
        "run": [run] * count,
        "index": np.arange(count),
        "label": ["cat", *[None] * (count - 1)],
        "probabilities": probabilities,
    }


def test_tables_are_written_one_after_the_other(tmp_path):
    path, tables = tmp_path / "new/folder/out.parquet", [table("runs/a", 3), table("runs/b", 2)]
    write_predictions(path, tables, label_names=NAMES)
    found = pq.read_table(path)
    assert found.column_names == ["run", "index", "label", "probabilities"]
    assert found["run"].to_pylist() == ["runs/a"] * 3 + ["runs/b"] * 2
    assert found["index"].to_pylist() == [0, 1, 2, 0, 1] and found["label"].to_pylist() == ["cat", None, None, "cat", None]
    assert found["probabilities"].to_pylist() == [row for each in tables for row in each["probabilities"].tolist()]
    assert str(found.schema.field("probabilities").type.value_type) == "float"
    assert json.loads(found.schema.metadata[b"label_names"]) == NAMES
    assert [each.name for each in path.parent.iterdir()] == ["out.parquet"]


def test_a_column_without_values_is_one_of_text(tmp_path):
    write_predictions(tmp_path / "out.parquet", [{"path": [None, None]}], label_names={})
    assert str(pq.read_schema(tmp_path / "out.parquet").field("path").type) == "string"


def test_a_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"
    write_predictions(path, [table("runs/a", 3)], label_names=NAMES)

    def fail(table, temporary):
        temporary.write_text("a part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(UserError, match="--out: cannot write .*out.parquet .No space left on device.; free disk space"):
        write_predictions(path, [table("runs/b", 2)], label_names=NAMES)
    assert pq.read_table(path).num_rows == 3 and [each.name for each in tmp_path.iterdir()] == ["out.parquet"]


def test_wrong_files_are_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "folder.parquet").mkdir()
    for name, message in (("out.csv", "end it with .parquet"), ("folder.parquet", "is a directory")):
        with pytest.raises(UserError, match=f"--out: .*{name} .*{message}"):
            check_predictions_file(tmp_path / name)
    assert check_predictions_file(tmp_path / "absent/out.parquet") is None
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="--out: a Parquet file needs pyarrow, which is not installed; pip install pyarrow"):
        check_predictions_file(tmp_path / "out.parquet")
