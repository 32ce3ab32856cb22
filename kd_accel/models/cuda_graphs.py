"""CUDA graphs: the kernels of a function are recorded once, and replayed with a single launch.

In: a function that works on static tensors, always at the same addresses. Out: a function that replays its graph.

A host needs 5 to 50 us to launch a kernel, and the kernels of a small network take a few us each, so that a GPU waits for its
host most of the time. The launch of a graph takes as long as a few kernels', for any number of kernels.

References:
    "CUDA Graphs" in the CUDA semantics notes of the PyTorch documentation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

_WARM_UP_ITERATIONS = 3
_failed: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. They are kept alive, because the allocator reads its pointer to them in the next capture."""


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the kernels of the `with` block on another stream, after all earlier and before all later kernels of this one."""
    present = torch.cuda.current_stream(stream.device)
    stream.wait_stream(present)
    try:
        # The outer context restores the current stream: torch.cuda.graph does not if the end of a capture fails.
        with torch.cuda.stream(stream):
            yield
    finally:
        present.wait_stream(stream)


def record(function: Callable[[], Result], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record a call of a function, without running its kernels.

    Args:
        function: Function that works on static tensors. It must have run on `stream` before, so that kernels are chosen and
            workspaces are allocated, and must not wait for the device (`synchronizations`): that would leave the allocator in
            an undefined state.
        stream: Stream of the capture, other than the default stream.

    Returns:
        (graph, result of the call, whose tensors each replay overwrites).

    Raises:
        RuntimeError: If the function cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    with on_stream(stream):
        try:
            # Threads that pin memory for a loader may call CUDA during the capture, which the default mode forbids.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError:
            _failed.append(graph)
            # Before PyTorch 2.14 the generator of a capture that has failed refuses all later random numbers.
            generator = torch.cuda.default_generators[stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
    return graph, result


@contextmanager
def synchronizations(found: list[str]) -> Iterator[None]:
    """Append to `found` a line for each time that the `with` block waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@dataclass(frozen=True)
class Replay(Generic[Result]):
    """Function that replays the graph of another one on the current stream.

    Attributes:
        function: The recorded function. It is kept alive, because the graph reads its static tensors.
        graph: The graph.
        result: Result of the recorded call, whose tensors each replay overwrites.
    """

    function: Callable[[], Result]
    graph: torch.cuda.CUDAGraph
    result: Result

    def __call__(self) -> Result:
        """Replay the graph, and return the result."""
        self.graph.replay()
        return self.result


def capture(function: Callable[[], Result], device: torch.device) -> Replay[Result]:
    """Run a function a few times, and record it.

    Args:
        function: Function that works on static tensors that it owns, and itself enters autocast and inference mode if needed.
        device: The GPU, which must be the current device.

    Returns:
        A function that replays the graph.

    Raises:
        RuntimeError: If the function waits for the device, or cannot be captured for another reason.
    """
    stream = torch.cuda.Stream(device)
    waits: list[str] = []
    with on_stream(stream):
        for _ in range(_WARM_UP_ITERATIONS):
            function()
        with synchronizations(waits):
            function()
    if waits:
        raise RuntimeError(f"the function waits for the device ({waits[0]})")
    graph, result = record(function, stream)
    return Replay(function, graph, result)
