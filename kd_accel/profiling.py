"""The parts of a training, marked where they run, so that a profile can say what each of them takes.

While nothing is recorded a mark costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, TypeVar

import torch
from torch.profiler import record_function

Item = TypeVar("Item")
RangeName = Literal[
    "loader", "teacher", "student", "projector", "loss", "backward", "optimizer", "logging", "evaluation", "checkpoint"
]
Observer = Callable[[RangeName], AbstractContextManager[object]]
PREFIX = "kd_accel."
_observers: list[Observer] = []


def profiler_range(name: RangeName) -> AbstractContextManager[object]:
    """`with stage("loss"):` marks what runs inside. `projector` lies within `student`; the others never overlap.

    What torch.compile traces has no marks: whether a profiler runs cannot be asked there.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if _observers:
        return _observers[-1](name)
    return record_function(PREFIX + name) if torch.autograd._profiler_enabled() else nullcontext()


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Let each mark inside enter what `observer` returns for its name, in place of a range of the profiler."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.pop()


def profiled(name: RangeName, items: Iterable[Item]) -> Iterator[Item]:
    """The same items; making each of them is marked."""
    iterator = iter(items)
    while True:
        with profiler_range(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
