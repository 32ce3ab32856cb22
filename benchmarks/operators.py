"""Counter of the operators that PyTorch dispatches in a training step, by part, on a CPU that simulates a GPU.

One dispatched operator counts as one launch, except views and allocations, which run no kernel, and operators whose tensors are
all on the host. A fused or foreach operator counts as one launch, although a GPU runs it as a few kernels.

Host and device are both CPU memory in this simulation, so the counter tracks which of the two each tensor would be in. On the
host are NumPy's memory, tensors created without a device, and results computed from such tensors alone. All other tensors are
on the device. `tensor.to(device)` copies a tensor from the host, and is counted. An operator that mixes both is an error, as on
a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kd_accel.profiling import RangeName, observed

REST = "rest"
"""Name of the part outside of all profiler ranges."""

_LAST: RangeName = "optimizer"
_FREE = {
    # views, and changes of a tensor's shape in place, whose schemas do not declare an alias
    *("aten::_unsafe_view", "aten::unsqueeze_", "aten::squeeze_", "aten::transpose_", "aten::t_", "aten::as_strided_"),
    *("aten::detach_", "aten::set_"),
    # allocations
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::empty_permuted"),
    *("aten::new_empty", "aten::new_empty_strided", "aten::resize_"),
}


@dataclass(frozen=True)
class StepCounts:
    """Operators of one step as {(part, operator): number}.

    Args:
        launches: Operators that run a kernel.
        free: Views and allocations.
    """

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    free: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def by_part(self) -> dict[str, int]:
        """Return the number of launches by part, in the order in which the parts first ran."""
        parts: Counter[str] = Counter()
        for (part, _), number in self.launches.items():
            parts[part] += number
        return dict(parts)


class OperatorCounter(TorchDispatchMode):
    """Counter of the operators of the steps that run inside `with counted(counter)`.

    A step ends at the end of its part "optimizer".

    Attributes:
        steps: Counts of each completed step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[StepCounts] = []
        self._step, self._parts = StepCounts(), [REST]
        # By address. The storages are kept alive, so that no other storage can get the same address.
        self._on_host: dict[int, torch.UntypedStorage] = {}
        self._is_copying = self._creates_on_host = False

    @contextmanager
    def part(self, name: RangeName) -> Iterator[None]:
        """Attribute the operators inside the `with` block to a part of the step."""
        self._parts.append(name)
        try:
            yield
        finally:
            self._parts.pop()
            if name == _LAST:
                self.steps.append(self._step)
                self._step = StepCounts()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Count the operators inside the `with` block as copies from the host to the device."""
        self._is_copying = True
        try:
            yield
        finally:
            self._is_copying = False

    @contextmanager
    def creating(self, *, on_host: bool) -> Iterator[None]:
        """Set the memory in which operators without a tensor argument create tensors, inside the `with` block."""
        before, self._creates_on_host = self._creates_on_host, on_host
        try:
            yield
        finally:
            self._creates_on_host = before

    def is_on_host(self, tensor: Tensor) -> bool:
        """Return whether the tensor would be in host memory."""
        return tensor.untyped_storage()._cdata in self._on_host

    def mark_on_host(self, tensor: Tensor) -> Tensor:
        """Record that the tensor is in host memory, and return the tensor."""
        storage = tensor.untyped_storage()
        self._on_host[storage._cdata] = storage
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if name == "aten::lift_fresh":  # wraps a tensor that was made outside of PyTorch, without a kernel
            return result
        if self._runs_on_host(name, tensors_in([*args, *kwargs.values()])):
            for tensor in tensors_in([result]):
                self.mark_on_host(tensor)
            return result
        counts = self._step.free if is_free(func) else self._step.launches
        counts[self._parts[-1], name.removeprefix("aten::")] += 1
        return result

    def _runs_on_host(self, name: str, arguments: Sequence[Tensor]) -> bool:
        if self._is_copying:
            return False
        if not arguments:
            return self._creates_on_host
        # Scalars do not decide: an operator on a GPU accepts a 0-dimensional tensor on the host.
        sides = {self.is_on_host(tensor) for tensor in arguments if tensor.dim()}
        if len(sides) == 2 and name != "aten::copy_":
            shapes = ", ".join(f"{tuple(tensor.shape)} on the {self._side(tensor)}" for tensor in arguments)
            raise RuntimeError(f"{name} mixes host and device: {shapes}")
        return sides == {True} if sides else all(map(self.is_on_host, arguments))

    def _side(self, tensor: Tensor) -> str:
        return "host" if self.is_on_host(tensor) else "device"


class _DeviceArguments(TorchFunctionMode):
    """Function mode that passes the `device` argument of each Python call to the counter."""

    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        has_device = any(isinstance(value, torch.device) for value in values)
        # Host and device are both the CPU, so without `copy` the call would dispatch no operator.
        if func is Tensor.to and has_device and self._counter.is_on_host(args[0]):
            with self._counter.copying():
                return func(*args, **{**kwargs, "copy": True})
        on_host = not has_device and all(map(self._counter.is_on_host, tensors_in(values)))
        with self._counter.creating(on_host=on_host):
            return func(*args, **kwargs)


@contextmanager
def counted(counter: OperatorCounter) -> Iterator[OperatorCounter]:
    """Count the operators inside the `with` block, by the profiler ranges of kd_accel/profiling.py."""
    from_numpy = torch.from_numpy
    with (
        mock.patch.object(torch, "from_numpy", lambda array: counter.mark_on_host(from_numpy(array))),
        observed(counter.part),
        _DeviceArguments(counter),
        counter,
    ):
        yield counter


def is_free(func: Any) -> bool:
    """Return whether an operator runs no kernel, because it returns a view or allocates."""
    aliases = [value.alias_info for value in func._schema.returns]
    returns_view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
    return returns_view or func._schema.name in _FREE


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors in a sequence, including those in nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found
