"""CUDA autocast on a machine without a GPU."""

from contextlib import contextmanager

import torch


@contextmanager
def autocast(use_bf16):
    """Enable CUDA autocast inside the `with` block. `torch.autocast("cuda")` disables itself without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", use_bf16)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()
