"""Reader of an offline W&B run: a LevelDB log of protobuf messages in blocks of 32 KiB."""

import json
import struct
import subprocess
import sys
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK_BYTES = 32768
_HEADER_BYTES = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_run(directory: Path) -> dict:
    """Read the only offline run in a directory.

    Returns:
        {"id", "project", "entity", "name", "group", "job_type", "tags", "config", "history": [{key: value}],
        "metrics": [names], "artifacts": [(name, type)]}.
    """
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    run = {"tags": [], "config": {}, "history": [], "metrics": [], "artifacts": []}
    for record in map(_parsed, _messages(path.read_bytes())):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "group": record.run.run_group, "job_type": record.run.job_type}
            run |= {"project": record.run.project, "entity": record.run.entity, "name": record.run.display_name}
            run["tags"] = list(record.run.tags)
            run["config"] |= _items(record.run.config.update)
        elif kind == "config":
            run["config"] |= _items(record.config.update)
        elif kind == "history":
            run["history"].append(_items(record.history.item))
        elif kind == "metric":
            run["metrics"].append(record.metric.name or record.metric.glob_name)
        elif kind == "request" and record.request.HasField("log_artifact"):
            artifact = record.request.log_artifact.artifact
            run["artifacts"].append((artifact.name, artifact.type))
        elif kind == "artifact":
            run["artifacts"].append((record.artifact.name, record.artifact.type))
    return run


def read_summary(directory: Path) -> dict:
    """Return the summary of the only offline run in a directory, as W&B's own reader shows it."""
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--summary", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["summary"]


def _messages(data):
    assert data[:4] == b":W&B", "not a W&B file"
    at, begun = _HEADER_BYTES, b""
    while at + _HEADER_BYTES <= len(data):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER_BYTES])
        chunk = data[at + _HEADER_BYTES : at + _HEADER_BYTES + length]
        at += _HEADER_BYTES + length
        begun = chunk if kind in (_FULL, _FIRST) else begun + chunk
        if kind in (_FULL, _LAST):
            yield begun


def _parsed(message):
    record = Record()
    record.ParseFromString(message)
    return record


def _items(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
