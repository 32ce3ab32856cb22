"""Capture of a forward as a CUDA graph, whose kernels are recorded once and then replayed with a single launch.

In: a function that runs a forward on static inputs. Out: a function that replays the graph.

References:
    "CUDA Graphs" in the CUDA semantics notes of the PyTorch documentation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP_ITERATIONS = 3
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. They are kept alive, because the allocator reads its pointer to them in the next capture."""


def capture(forward: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record one call of `forward` as a CUDA graph.

    Args:
        forward: Function that runs on static inputs, and itself enters autocast and inference mode if needed.
        device: The GPU, which must be the current device.

    Returns:
        A function that replays the graph on the current stream and returns the output tensor, which each replay overwrites.

    Raises:
        RuntimeError: If the forward synchronizes with the device, or cannot be captured for another reason.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    # The outer context restores the current stream: torch.cuda.graph does not if the end of a capture fails.
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
    """Run the forward on the stream of the capture, so that kernels are chosen and workspaces are allocated before it.

    Raises:
        RuntimeError: If the forward synchronizes. Within a capture, this would leave the allocator in an undefined state.
    """
    before = torch.cuda.get_sync_debug_mode()
    for _ in range(_WARM_UP_ITERATIONS):
        forward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
