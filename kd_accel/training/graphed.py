"""Optimizer steps as a CUDA graph: recorded in the third step of a process, and replayed from then on.

The steps before and the replays run the same kernels on the same values, so a training that is stopped and resumed computes the
same bits. For this, what changes from step to step is on the device in all of them: the learning rate, and each temperature or
weight with a schedule. All other numbers are constants of the kernels.

A model or loss whose forward depends on anything else of the host (a Python counter, say) must be trained with
`train.cuda_graph: never`: the graph repeats what the recorded step did.

The graph has the work of one step from the teacher's output to the optimizer. Batches are made, and cached outputs are fetched,
before each replay, while the device runs the one before it.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from kd_accel.errors import describe_error
from kd_accel.losses.distiller import LossWeights
from kd_accel.models.cuda_graphs import on_stream, record, synchronizations
from kd_accel.profiling import profiler_range
from kd_accel.training.nonfinite import StepValues
from kd_accel.training.step import Compute, StepInput, TrainStep

_WARM_UP_STEPS = 2
"""Steps before the capture, in which kernels are chosen and states are allocated."""


class DeviceWeights:
    """Temperature and weights, in which the scheduled ones are scalar tensors on the device.

    Args:
        device: The device.
        scheduled: Names of the scheduled ones: `temperature`, `alpha`, `label_weight`, `features/NAME`, `teachers/NAME`.
    """

    def __init__(self, device: torch.device, scheduled: Collection[str]) -> None:
        self._scalars = {name: torch.zeros((), device=device) for name in scheduled}
        self._values: dict[str, float] = {}

    def __call__(self, weights: LossWeights) -> LossWeights:
        """Return the weights of a step, with the tensors of the step before, which now have the values of this one."""
        label_weight = weights.label_weight
        return LossWeights(
            temperature=self._scalar("temperature", weights.temperature),
            alpha=self._scalar("alpha", weights.alpha),
            label_weight=None if label_weight is None else self._scalar("label_weight", label_weight),
            features={name: self._scalar(f"features/{name}", weight) for name, weight in weights.features.items()},
            teachers={name: self._scalar(f"teachers/{name}", weight) for name, weight in weights.teachers.items()},
        )

    def _scalar(self, name: str, value: float | Tensor) -> float | Tensor:
        if name not in self._scalars:
            return value
        assert isinstance(value, float)
        # The value is an argument of the kernel: a copy from the host would have to wait until it was read.
        if self._values.get(name) != value:
            self._scalars[name].fill_(value)
            self._values[name] = value
        return self._scalars[name]


class GraphedStep:
    """`TrainStep.compute` as a CUDA graph.

    Args:
        step: The step, whose optimizer has its learning rate on the device.
        weights: Temperature and weights on the device.
        refuse: Function that is called with the reason if the step cannot be captured; the steps then run as without a graph.
    """

    def __init__(self, step: TrainStep, weights: DeviceWeights, refuse: Callable[[str], None]) -> None:
        # The step refers to this object; a cycle would keep its memory until the next garbage collection.
        self._step = cast(TrainStep, weakref.proxy(step))
        self._weights, self._refuse = weights, refuse
        self._stream = torch.cuda.Stream(step.accelerator.device)
        self._steps_done = 0
        self._is_refused = False
        self._replay: _Replay | None = None

    @property
    def is_replayed(self) -> bool:
        """True if the step was captured."""
        return self._replay is not None

    def __call__(self, inputs: Iterable[StepInput], count: int, weights: LossWeights) -> StepValues:
        """Make one update; see `TrainStep.compute`."""
        on_device = self._weights(weights)
        if self._is_refused:
            return self._step.compute(inputs, count, on_device)
        # The graph reads the inputs of all micro-batches.
        inputs = list(inputs)
        if self._steps_done < _WARM_UP_STEPS:
            return self._warm_up(inputs, on_device)
        if self._replay is None:
            self._replay = self._capture(inputs, on_device)
        if self._replay is not None and not fits(self._replay.inputs, inputs):
            self._replay = None
            self.give_up("the inputs of the steps differ in their shapes")
        if self._replay is None:
            return self._step.compute(inputs, count, on_device)
        with profiler_range("graph"):
            return self._replay(inputs)

    def _warm_up(self, inputs: Sequence[StepInput], weights: LossWeights) -> StepValues:
        """Make an update on the stream of the capture. In the last one, look for what a replay would not repeat."""
        self._steps_done += 1
        waits: list[str] = []
        with on_stream(self._stream):
            if self._steps_done < _WARM_UP_STEPS:
                return self._step.compute(inputs, len(inputs), weights)
            before = host_state(self._step.train_state.module)
            with synchronizations(waits):
                values = self._step.compute(inputs, len(inputs), weights)
        if waits:
            self.give_up(f"the step waits for the device in {waits[0]}")
        elif changed := [name for name, value in host_state(self._step.train_state.module).items() if before[name] != value]:
            self.give_up(f"the step changes {' and '.join(changed)}, which a graph does not repeat")
        return values

    def _capture(self, inputs: Sequence[StepInput], weights: LossWeights) -> _Replay | None:
        """Record a step without running it. Returns None if that fails."""
        try:
            return _Replay(self._step.compute, inputs, weights, self._stream)
        except RuntimeError as error:
            self._step.guard.forget()
            self._step.train_state.optimizer.optimizer.zero_grad(set_to_none=True)
            self.give_up(describe_error(error.__context__ if isinstance(error.__context__, RuntimeError) else error))
            return None

    def give_up(self, reason: str) -> None:
        """Run all later steps without a graph. reason: the cause, for the user."""
        self._is_refused = True
        self._refuse(reason)


class _Replay:
    """Recorded step. Args: as `GraphedStep`; inputs are copied, and give the shapes of all later inputs."""

    def __init__(self, compute: Compute, inputs: Sequence[StepInput], weights: LossWeights, stream: torch.cuda.Stream) -> None:
        self.inputs = [each.clone() for each in inputs]

        def step() -> tuple[StepValues, Tensor]:
            values = compute(self.inputs, len(self.inputs), weights)
            return values, values.packed()

        self._graph, (self._values, self._packed) = record(step, stream)

    def __call__(self, inputs: Sequence[StepInput]) -> StepValues:
        for own, new in zip(self.inputs, inputs, strict=True):
            for static, tensor in zip(own.tensors, new.tensors, strict=True):
                static.copy_(tensor, non_blocking=True)
        self._graph.replay()
        # The next replay overwrites the values, which are read with the next line of metrics.
        return self._values.unpacked(self._packed.clone())


def host_state(module: nn.Module) -> dict[str, object]:
    """Return what a step may change on the host and a graph would not, by its description."""
    tensors = [*module.parameters(), *module.buffers()]
    return {
        "the state of Python's random generator": random.getstate(),
        "the state of NumPy's random generator": str(np.random.get_state(legacy=True)),
        "the state of PyTorch's random generator on the CPU": torch.get_rng_state().tolist(),
        "a weight or buffer by another tensor": [tensor.data_ptr() for tensor in tensors],
    }


def fits(recorded: Sequence[StepInput], inputs: Sequence[StepInput]) -> bool:
    """Return whether inputs have the shapes, types and strides of the recorded ones."""

    def layouts(of: Sequence[StepInput]) -> list[list[tuple[object, ...]]]:
        return [[(tensor.shape, tensor.dtype, tensor.stride()) for tensor in each.tensors] for each in of]

    return layouts(recorded) == layouts(inputs)
