"""Reader of untrusted safetensors files: no pickle, and no allocation beyond the size of the file."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from kd_accel.errors import describe_error

MAX_HEADER_BYTES = 16 * 2**20
"""Limit of the header, enough for over 100,000 tensors; parsing a header takes many times its size in memory."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file to the CPU, by name.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a valid safetensors file; the message contains the reason.
    """
    if path.exists() and not path.is_file():
        raise ValueError("is not a regular file")
    with path.open("rb") as file:
        header_bytes, file_bytes = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(
            f"its header claims {header_bytes} bytes, more than {MAX_HEADER_BYTES} or than the file has ({file_bytes} bytes)"
        )
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:
        # safetensors raises its own exception, and other exceptions for data types that torch does not have.
        raise ValueError(describe_error(error)) from None
