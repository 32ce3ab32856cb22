"""Counter of the operators that PyTorch dispatches in a training step, by part, on a CPU that stands in for a GPU.

One dispatched operator is one launch. Not counted as launches: views and allocations, for which no kernel runs, and operators
whose tensors are all on the host. A fused or foreach operator is one launch; a GPU runs it as a few kernels.

Host and device are both CPU memory here, so the counter tracks which of them each tensor would be in. On the host: NumPy's
memory, tensors created without a device, and results computed from such tensors alone. Everything else is on the device.
`tensor.to(device)` of a tensor on the host is the copy that it would be with a GPU: it is made, and counted. An operator that
mixes both is an error, as it would be with a GPU.
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
"""Name of the part outside of any profiler range."""

_LAST: RangeName = "optimizer"
_FREE = {
    # views, and changes of a tensor's own shape, which their schemas do not declare as such
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
        launches: those that run a kernel.
        free: views and allocations.
    """

    launches: Counter[tuple[str, str]] = field(default_factory=Counter)
    free: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def by_part(self) -> dict[str, int]:
        """Launches by part, in the order in which the parts first ran."""
        parts: Counter[str] = Counter()
        for (part, _), number in self.launches.items():
            parts[part] += number
        return dict(parts)


class OperatorCounter(TorchDispatchMode):
    """Counter of the steps that run inside `with counted(counter)`.

    A step ends where its part "optimizer" ends; `steps` holds the counts of those that have ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[StepCounts] = []
        self._step, self._parts = StepCounts(), [REST]
        self._on_host: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no other memory takes the address
        self._is_copying = self._creates_on_host = False

    @contextmanager
    def part(self, name: RangeName) -> Iterator[None]:
        """Attribute the operators inside to this part of the step."""
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
        """Count what runs inside as a copy from the host to the device."""
        self._is_copying = True
        try:
            yield
        finally:
            self._is_copying = False

    @contextmanager
    def creating(self, *, on_host: bool) -> Iterator[None]:
        """Let operators inside that take no tensor create theirs on that side."""
        before, self._creates_on_host = self._creates_on_host, on_host
        try:
            yield
        finally:
            self._creates_on_host = before

    def is_on_host(self, tensor: Tensor) -> bool:
        """Return whether the tensor would be in host memory."""
        return tensor.untyped_storage()._cdata in self._on_host

    def keep_on_host(self, tensor: Tensor) -> Tensor:
        """Record that the tensor is in host memory, and return it."""
        storage = tensor.untyped_storage()
        self._on_host[storage._cdata] = storage
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        name = func._schema.name
        if name == "aten::lift_fresh":  # marks a tensor that was made outside of PyTorch, and does nothing
            return result
        if self._runs_on_host(name, tensors_in([*args, *given.values()])):
            for made in tensors_in([result]):
                self.keep_on_host(made)
            return result
        counts = self._step.free if is_free(func) else self._step.launches
        counts[self._parts[-1], name.removeprefix("aten::")] += 1
        return result

    def _runs_on_host(self, name: str, given: Sequence[Tensor]) -> bool:
        if self._is_copying:
            return False
        if not given:
            return self._creates_on_host
        sides = {self.is_on_host(tensor) for tensor in given if tensor.dim()}  # a GPU takes scalars from the host
        if len(sides) == 2 and name != "aten::copy_":
            shapes = ", ".join(f"{tuple(tensor.shape)} on the {self._side(tensor)}" for tensor in given)
            raise RuntimeError(f"{name} mixes host and device: {shapes}")
        return sides == {True} if sides else all(map(self.is_on_host, given))

    def _side(self, tensor: Tensor) -> str:
        return "host" if self.is_on_host(tensor) else "device"


class _Calls(TorchFunctionMode):
    """Part of the tracking that needs the Python call: the device that it names."""

    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        values = [*args, *given.values()]
        names_device = any(isinstance(value, torch.device) for value in values)
        if func is Tensor.to and names_device and self._counter.is_on_host(args[0]):
            with self._counter.copying():
                return func(*args, **{**given, "copy": True})
        on_host = not names_device and all(map(self._counter.is_on_host, tensors_in(values)))
        with self._counter.creating(on_host=on_host):
            return func(*args, **given)


@contextmanager
def counted(counter: OperatorCounter) -> Iterator[OperatorCounter]:
    """Count the operators inside, and attribute them by the profiler ranges of kd_accel/profiling.py."""
    from_numpy = torch.from_numpy
    with (
        mock.patch.object(torch, "from_numpy", lambda array: counter.keep_on_host(from_numpy(array))),
        observed(counter.part),
        _Calls(counter),
        counter,
    ):
        yield counter


def is_free(func: Any) -> bool:
    """Return whether the operator runs no kernel: it makes a view, or allocates."""
    returns = func._schema.returns
    gives_view = bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return gives_view or func._schema.name in _FREE


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among values, and in lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found
