"""A forward as a CUDA graph: its kernels recorded once, then replayed with one launch.

In: a function that runs a forward on fixed inputs. Out: a function that replays it.
Reference: "CUDA Graphs" in the CUDA semantics notes of the PyTorch documentation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP_ITERATIONS = 3
_failed: list[torch.cuda.CUDAGraph] = []
"""Kept alive: after a failed capture PyTorch's allocator keeps a pointer to the graph and reads it in the next capture."""


def capture(forward: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record one call of `forward` as a CUDA graph.

    Args:
        forward: runs on static inputs, under autocast and inference mode where it should be.
        device: a GPU, the current device.

    Returns:
        A function that replays the graph on the current stream and returns its output, one tensor that each replay fills.

    Raises:
        RuntimeError: the forward waits for the device, or cannot be captured for another reason.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    # The outer context restores the current stream: torch.cuda.graph does not where the end of a capture fails.
    with torch.cuda.stream(side):
        _warm_up(forward)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                output = forward()
        except RuntimeError:
            _failed.append(graph)
            raise
    torch.cuda.current_stream(device).wait_stream(side)

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _warm_up(forward: Callable[[], Tensor]) -> None:
    """Choose kernels and allocate workspaces on the stream of the capture. Raises RuntimeError where the forward synchronizes.

    A synchronization inside a capture would end it with an error as well, but in an undefined state of the allocator.
    """
    before = torch.cuda.get_sync_debug_mode()
    for _ in range(_WARM_UP_ITERATIONS):
        forward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
