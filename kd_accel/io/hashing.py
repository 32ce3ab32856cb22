"""Content digests of tensors, arrays and settings, independent of paths and times.

The hash is xxh3_128 over names, types, shapes and bytes. It is fast enough to be computed at every start (about 20 GB/s), but
not cryptographic: it detects accidental changes, not forgery.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute a digest of named tensors, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Compute a digest of JSON-serializable settings, regardless of the order of their keys."""
    return xxhash.xxh3_128(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def arrays_digest(*arrays: np.ndarray) -> str:
    """Compute a digest of the concatenated bytes of arrays."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
