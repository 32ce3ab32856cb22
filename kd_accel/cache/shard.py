"""One file of a cache: safetensors whose header is known before it is read, apart from the checksum of the data.

The header is written here and not by the library, because then every byte of the file follows from the plan and the data:
same bytes from every builder, a flipped bit anywhere is a difference, and the place of each sample is known without parsing.
safetensors reads these files like any other. Values are little-endian, samples contiguous.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from kd_accel.cache.spec import CacheSpec, Shard, TensorSpec
from kd_accel.io.files import replace_whole

_KEY = "kd_accel"
_ALIGNMENT = 64
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
_CHECKSUM = re.compile(rb'\\"checksum\\":\\"([0-9a-f]{32})\\"')
_BLANK = "0" * 32


def write_shard(directory: Path, cache_spec: CacheSpec, shard: Shard, values: Tensor, scale: Tensor | None) -> str:
    """Write one file under a temporary name and rename it. Returns the checksum of its data.

    values: [n, ...] as `encode` gives them, on the CPU. scale: [D] where the type has one.

    Not flushed to the disk here: a file that a power cut emptied does not match its checksum and is written again.
    """
    assert values.shape == (shard.samples, *cache_spec.tensors[shard.tensor].shape), values.shape
    parts = [_bytes_of(tensor) for tensor in ([] if scale is None else [scale]) + [values]]
    checksum = _checksum(parts)
    path = directory / shard.name
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(_header(cache_spec, shard, checksum))
            for part in parts:
                file.write(part)

    replace_whole(path, write)
    return checksum


def damage(
    directory: Path, cache_spec: CacheSpec, shard: Shard, *, checksum: str | None = None, reads_data: bool = True
) -> str | None:
    """Why a file is not the one that the plan asks for, or None. checksum: what the manifest says, where there is one.

    reads_data: check every byte of the data as well; without it header and length alone.
    """
    path = directory / shard.name
    if path.exists() and not path.is_file():
        return "is no file"
    try:
        with path.open("rb") as file:
            found = _header_damage(file.read(data_offset(cache_spec, shard)), cache_spec, shard, checksum)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if found is not None:
        return found
    request = data_offset(cache_spec, shard) + _data_bytes(cache_spec, shard)
    if size != request:
        return f"has {size} bytes instead of {request}"
    if reads_data and not is_data_whole(open_shard(directory, cache_spec, shard), cache_spec, shard):
        return "does not match its checksum"
    return None


def stored_checksum(directory: Path, cache_spec: CacheSpec, shard: Shard) -> str:
    """Of a file that is whole."""
    with (directory / shard.name).open("rb") as file:
        return _stated_checksum(file.read(data_offset(cache_spec, shard)))


def open_shard(directory: Path, cache_spec: CacheSpec, shard: Shard) -> memoryview:
    """The whole file, mapped. The view keeps the mapping alive, and no file stays open for it (Python's own mmap keeps one)."""
    path = directory / shard.name
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return memoryview(mapped.numpy()).toreadonly()  # type: ignore[arg-type]


def is_data_whole(file: memoryview, cache_spec: CacheSpec, shard: Shard) -> bool:
    """Whether the data matches the checksum in the header: a read of every byte, in order."""
    start = data_offset(cache_spec, shard)
    return xxhash.xxh3_128_hexdigest(file[start:]) == _stated_checksum(bytes(file[:start]))


def scale_of(file: memoryview, cache_spec: CacheSpec, shard: Shard) -> Tensor | None:
    """The scale per channel, float32 [D], where the type has one."""
    spec = cache_spec.tensors[shard.tensor]
    if not spec.is_scaled:
        return None
    return torch.from_numpy(np.frombuffer(file, np.float32, count=spec.shape[0], offset=data_offset(cache_spec, shard)).copy())


def values_offset(cache_spec: CacheSpec, shard: Shard) -> int:
    """Where the first sample begins."""
    return data_offset(cache_spec, shard) + _scale_bytes(cache_spec.tensors[shard.tensor])


def data_offset(cache_spec: CacheSpec, shard: Shard) -> int:
    """Length of the header: it does not depend on the checksum."""
    return len(_header(cache_spec, shard, _BLANK))


def _header(cache_spec: CacheSpec, shard: Shard, checksum: str) -> bytes:
    spec, offset = cache_spec.tensors[shard.tensor], 0
    about = {
        "cache": cache_spec.digest,
        "checksum": checksum,
        "first_sample": shard.first,
        "projector": spec.projector,
        "samples": shard.samples,
        "split": shard.split,
        "tensor": shard.tensor,
        "view": shard.view,
    }
    content: dict[str, Any] = {"__metadata__": {_KEY: _canonical(about)}}
    if spec.is_scaled:
        offset = _scale_bytes(spec)
        content["scale"] = _entry("F32", spec.shape[:1], 0, offset)
    content["values"] = _entry(_NAMES[spec.dtype], (shard.samples, *spec.shape), offset, shard.samples * spec.sample_bytes)
    text = _canonical(content).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _entry(dtype: str, shape: Sequence[int], offset: int, length: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _header_damage(header: bytes, cache_spec: CacheSpec, shard: Shard, checksum: str | None) -> str | None:
    stated = _CHECKSUM.search(header)
    if stated is None:
        return "has no header of a cache"
    if header != _header(cache_spec, shard, stated[1].decode()):
        return "has the header of another cache or place, or a damaged one"
    if checksum is not None and stated[1].decode() != checksum:
        return "has another checksum than the manifest says"
    return None


def _stated_checksum(header: bytes) -> str:
    stated = _CHECKSUM.search(header)
    assert stated is not None, "only asked of files whose header was checked"
    return stated[1].decode()


def _scale_bytes(spec: TensorSpec) -> int:
    return 4 * spec.shape[0] if spec.is_scaled else 0


def _data_bytes(cache_spec: CacheSpec, shard: Shard) -> int:
    spec = cache_spec.tensors[shard.tensor]
    return _scale_bytes(spec) + shard.samples * spec.sample_bytes


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _checksum(parts: Sequence[memoryview]) -> str:
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
