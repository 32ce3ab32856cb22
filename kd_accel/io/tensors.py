"""Reading a safetensors file that somebody else may have written: no pickle, nothing larger than the file itself."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

MAX_HEADER_BYTES = 16 * 2**20
"""Over a hundred thousand tensors: a longer header is no model's, and would take many times its length in memory."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU. Raises OSError, or ValueError that says what is wrong with the file."""
    if path.exists() and not path.is_file():
        raise ValueError("is no file")
    with path.open("rb") as file:
        header_bytes, file_bytes = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(
            f"its header claims {header_bytes} bytes; {MAX_HEADER_BYTES} and the file itself ({file_bytes} bytes) are the most"
        )
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # the library raises its own kind, and others for a type that torch does not have
        raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
