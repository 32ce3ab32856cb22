"""Fixtures of the benchmark tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def kernels():
    """Restore the global settings that a benchmark changes."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
