"""The parts of a training, marked where they run, so that a profile can say what each of them takes.

While nothing is recorded a mark costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from torch.profiler import record_function

Item = TypeVar("Item")
Stage = Literal[
    "loader", "teacher", "student", "projector", "loss", "backward", "optimizer", "logging", "evaluation", "checkpoint"
]
PREFIX = "kd_accel."


def stage(name: Stage) -> AbstractContextManager[object]:
    """`with stage("loss"):` marks what runs inside. `projector` lies within `student`; the others never overlap.

    What torch.compile traces has no marks: whether a profiler runs cannot be asked there.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return record_function(PREFIX + name)


def staged(name: Stage, items: Iterable[Item]) -> Iterator[Item]:
    """The same items; making each of them is marked."""
    iterator = iter(items)
    while True:
        with stage(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
