"""Process-wide choice of GPU kernels: autotuned or deterministic ones, TF32 or full float32. No effect on a CPU."""

from __future__ import annotations

import os

import torch


def choose_kernels(*, deterministic: bool = False, tf32: bool = True) -> None:
    """Set PyTorch's switches, before CUDA starts: cuBLAS reads its workspace configuration then.

    Args:
        deterministic: use deterministic kernels only; slower. Otherwise cuDNN tries its kernels and keeps the fastest.
        tf32: let float32 convolutions and matrix products round their inputs to TF32 (10 bits of mantissa) on GPUs that
            have it. PyTorch's own defaults are two precisions at once: TF32 in convolutions, float32 in matrix products.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
