"""Reader of an offline W&B run: a LevelDB log of protobuf messages in blocks of 32 KiB."""

import json
import struct
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK_BYTES = 32768
_HEADER_BYTES = 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def read_run(directory: Path) -> dict:
    """Read the only offline run in a directory.

    Returns:
        {"id", "group", "job_type", "tags", "config", "history": [{key: value}], "metrics": [names]}.
    """
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    run = {"id": None, "group": None, "job_type": None, "tags": [], "config": {}, "history": [], "metrics": []}
    for record in map(_parsed, _messages(path.read_bytes())):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "group": record.run.run_group, "job_type": record.run.job_type}
            run["tags"] = list(record.run.tags)
            run["config"] |= _items(record.run.config.update)
        elif kind == "config":
            run["config"] |= _items(record.config.update)
        elif kind == "history":
            run["history"].append(_items(record.history.item))
        elif kind == "metric":
            run["metrics"].append(record.metric.name or record.metric.glob_name)
    return run


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
