"""One file of a cache: storage types, and a safetensors file whose header follows from the spec.

The header is composed without the safetensors library, so every byte of a file follows from the spec and the data. Any build
produces the same bytes, any flipped bit is detected, and the position of each sample is known without parsing. The safetensors
library can read the files. Values are little-endian; the samples of a file are contiguous.

Largest error of `decode(encode(x))`, relative to |x| for the float types and to the channel's largest |x| in the file for int8:
float32 0, float16 2^-11, bfloat16 2^-8, int8 1/254.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from kd_accel.cache.spec import CacheSpec, Shard, TensorSpec
from kd_accel.config.schema import StorageType
from kd_accel.errors import UserError
from kd_accel.io.files import replace_whole

TORCH_TYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
INT8_LARGEST = 127
RELATIVE_ERROR = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 1 / 254}

MISSING = "is missing"
_NOT_REGULAR = "is not a regular file"
_KEY = "kd_accel"
_ALIGNMENT = 64
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
# The metadata of a safetensors file are strings, so ours is a JSON object inside a JSON string: its quotes are escaped. A quote
# within a string of the inner object, such as a layer's name, is escaped twice (\\\"), which the pattern cannot match.
_CHECKSUM = re.compile(rb'\\"checksum\\":\\"([0-9a-f]{32})\\"')
_NO_CHECKSUM = "0" * 32


def encode(values: Tensor, dtype: StorageType, *, name: str) -> tuple[Tensor, Tensor | None]:
    """Convert values to a storage type.

    Args:
        values: Values [n, D, ...], float32, or already of the storage type unless that is int8.
        dtype: Storage type.
        name: Name of the tensor, for the error.

    Returns:
        (values as they are stored, scale float32 [D] for int8 or None).

    Raises:
        UserError: If a value is not finite, or too large for the type.
    """
    if dtype == "int8":
        other = [axis for axis in range(values.ndim) if axis != 1]
        largest = torch.maximum(values.amax(other), -values.amin(other))
        _check_finite(largest, name, dtype)
        scale = torch.where(largest > 0, largest / INT8_LARGEST, torch.ones_like(largest))
        # In place: the copies of a large file take longer than the arithmetic.
        steps = (values / _by_channel(scale, values)).round_().clamp_(-INT8_LARGEST, INT8_LARGEST)
        return steps.to(torch.int8), scale
    stored = values.to(TORCH_TYPE[dtype])
    _check_finite(stored, name, dtype)
    return stored, None


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Convert stored values back to float32.

    Args:
        stored: Values as `encode` returns them, [n, D, ...].
        scale: Scale per channel, float32 [D], or [n, D] for samples of several files; None for the float types.

    Returns:
        Decoded values, float32 [n, D, ...].
    """
    values = stored.float()
    return values if scale is None else values * _by_channel(scale, values)


def _by_channel(scale: Tensor, values: Tensor) -> Tensor:
    leading = scale.shape if scale.ndim == 2 else (1, *scale.shape)
    return scale.reshape(*leading, *[1] * (values.ndim - 2))


def _check_finite(values: Tensor, name: str, dtype: StorageType) -> None:
    # NaN propagates through aminmax, which is thirty times as fast as isfinite on all values.
    if not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise UserError(
            f"teacher.cache.dtype: the teacher's output {name} has a value that is not finite, or too large for {dtype}; use "
            "bfloat16 or float32, and check the teacher with `kd-accel evaluate` if the error remains"
        )


def write_shard(directory: Path, cache_spec: CacheSpec, shard: Shard, values: Tensor, scale: Tensor | None) -> str:
    """Write a file under a temporary name and rename it.

    The file is not flushed to the disk. A power failure may leave an empty or truncated file, which does not match its
    checksum, and which the next build replaces.

    Args:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        shard: The file.
        values: Values as `encode` returns them, [n, ...], in host memory.
        scale: Scale as `encode` returns it, float32 [D]; None for the float types.

    Returns:
        The checksum of the data.
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


def find_damage(
    directory: Path, cache_spec: CacheSpec, shard: Shard, *, checksum: str | None = None, reads_data: bool = True
) -> str | None:
    """Check a file against the spec.

    Args:
        directory: Directory of the cache.
        cache_spec: Spec of the cache.
        shard: The file.
        checksum: Checksum of the file in the manifest, if the manifest lists it.
        reads_data: Whether every byte of the data is checked too, not only header and length.

    Returns:
        The damage, worded to follow the file's name in a message; None if the file is intact.
    """
    path = directory / shard.name
    try:
        if path.exists() and not path.is_file():
            return _NOT_REGULAR
        with path.open("rb") as file:
            found = _header_damage(file.read(data_offset(cache_spec, shard)), cache_spec, shard, checksum)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    found = found or _size_damage(size, cache_spec, shard)
    if found is None and reads_data and not is_data_intact(open_shard(directory, cache_spec, shard), cache_spec, shard):
        return "does not match its checksum"
    return found


def find_size_damage(directory: Path, cache_spec: CacheSpec, shard: Shard) -> str | None:
    """Check that a file exists and has the size that follows from the spec, without opening the file.

    Returns:
        The damage, as `find_damage` returns it; None for a file of the right size.
    """
    try:
        status = (directory / shard.name).stat()
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return _size_damage(status.st_size, cache_spec, shard) if stat.S_ISREG(status.st_mode) else _NOT_REGULAR


def stored_checksum(directory: Path, cache_spec: CacheSpec, shard: Shard) -> str:
    """Read the checksum from the header of an intact file."""
    with (directory / shard.name).open("rb") as file:
        return _header_checksum(file.read(data_offset(cache_spec, shard)))


def open_shard(directory: Path, cache_spec: CacheSpec, shard: Shard) -> memoryview:
    """Map a complete file into memory.

    The returned view keeps the mapping alive without an open file; Python's mmap would keep one file open per shard.
    """
    path = directory / shard.name
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return memoryview(mapped.numpy()).toreadonly()  # type: ignore[arg-type]


def read_rows(directory: Path, cache_spec: CacheSpec, shard: Shard, rows: Sequence[int]) -> Tensor:
    """Read rows of an intact file, float32 [n, *shape]. Training reads them by `Reader`, which needs all files of a view."""
    spec, file = cache_spec.tensors[shard.tensor], open_shard(directory, cache_spec, shard)
    values, length = file[values_offset(cache_spec, shard) :], spec.sample_bytes
    content = bytearray().join(values[row * length : (row + 1) * length] for row in rows)
    stored = torch.frombuffer(content, dtype=TORCH_TYPE[spec.dtype]).view(len(rows), *spec.shape)
    return decode(stored, read_scale(file, cache_spec, shard) if spec.is_scaled else None)


def value_range(directory: Path, cache_spec: CacheSpec, shard: Shard) -> float:
    """Return the largest magnitude in an intact int8 file, which decides its rounding error; 0 for the float types."""
    if not cache_spec.tensors[shard.tensor].is_scaled:
        return 0.0
    return INT8_LARGEST * read_scale(open_shard(directory, cache_spec, shard), cache_spec, shard).max().item()


def is_data_intact(file: memoryview, cache_spec: CacheSpec, shard: Shard) -> bool:
    """Return whether the data matches the checksum in the header. Reads every byte, in order."""
    start = data_offset(cache_spec, shard)
    return xxhash.xxh3_128_hexdigest(file[start:]) == _header_checksum(bytes(file[:start]))


def read_scale(file: memoryview, cache_spec: CacheSpec, shard: Shard) -> Tensor:
    """Read the scale per channel of an int8 tensor, float32 [D]."""
    channels = cache_spec.tensors[shard.tensor].shape[0]
    return torch.from_numpy(np.frombuffer(file, np.float32, count=channels, offset=data_offset(cache_spec, shard)).copy())


def values_offset(cache_spec: CacheSpec, shard: Shard) -> int:
    """Return the position of the first sample in the file, in bytes."""
    return data_offset(cache_spec, shard) + _scale_bytes(cache_spec.tensors[shard.tensor])


def data_offset(cache_spec: CacheSpec, shard: Shard) -> int:
    """Return the length of the header in bytes, which does not depend on the checksum."""
    return len(_header(cache_spec, shard, _NO_CHECKSUM))


def _header(cache_spec: CacheSpec, shard: Shard, checksum: str) -> bytes:
    spec, offset = cache_spec.tensors[shard.tensor], 0
    metadata = {
        "checksum": checksum,
        "fingerprint": cache_spec.fingerprint,
        "first_sample": shard.first,
        "samples": shard.samples,
        "split": shard.split,
        "target": spec.target_digest,
        "tensor": shard.tensor,
        "view": shard.view,
    }
    content: dict[str, Any] = {"__metadata__": {_KEY: _canonical(metadata)}}
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
    found = _CHECKSUM.search(header)
    if found is None:
        return "has a header that is not of a cache"
    if header != _header(cache_spec, shard, found[1].decode()):
        return "has the header of another cache or another shard, or a damaged header"
    if checksum is not None and found[1].decode() != checksum:
        return "has another checksum than in manifest.json"
    return None


def _size_damage(size: int, cache_spec: CacheSpec, shard: Shard) -> str | None:
    expected = data_offset(cache_spec, shard) + _data_bytes(cache_spec, shard)
    return None if size == expected else f"has {size} bytes instead of {expected}"


def _header_checksum(header: bytes) -> str:
    found = _CHECKSUM.search(header)
    assert found is not None, "called only for files whose header was checked"
    return found[1].decode()


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
