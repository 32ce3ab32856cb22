"""Recording what named modules give, without changing the model and without a second forward.

A recorder hangs forward hooks on the tapped modules while it is open and takes every one of them away when it closes, whatever
happened in between. A compiled model must be compiled after the recorder was opened.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.types import UserError

_LISTED = 12


class TapRecorder:
    """While open, each forward of `model` leaves the outputs of the named modules here, to be taken once."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Raises UserError for a name that the model does not have; it lists what there is."""
        self._modules = {name: _find(model, name) for name in names}
        self._handles: list[Any] = []
        self._features: dict[str, Tensor] = {}

    def open(self) -> TapRecorder:
        assert not self._handles, "the recorder is open already"
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._features = {}

    def take(self) -> dict[str, Tensor]:
        """The features [B, D, H, W] of the latest forward, by tap; forgets them."""
        features, self._features = self._features, {}
        return features

    def __enter__(self) -> TapRecorder:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            self._features[name] = output

        return record


def probe_taps(model: nn.Module, names: Sequence[str], *, image_size: int) -> dict[str, tuple[int, int, int]]:
    """(D, H, W) of each tap for square images of `image_size` pixels. The model and the global generator stay as they are.

    Raises UserError for a tap that is no feature map; it lists modules that are.
    """
    outputs = _outputs_of(model, list(names), image_size)
    for name in names:
        output = outputs.get(name)
        if not isinstance(output, Tensor) or output.dim() != 4:
            raise UserError(_not_a_map(model, name, output, image_size))
    return {name: tuple(outputs[name].shape[1:]) for name in names}


@torch.no_grad()
def _outputs_of(model: nn.Module, names: list[str], image_size: int) -> dict[str, Any]:
    was_training = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    model.eval()
    try:
        with TapRecorder(model, names) as recorder, torch.random.fork_rng(devices=[]):
            model(torch.zeros(2, 3, image_size, image_size, device=parameter.device))
            return dict(recorder.take())
    finally:
        for module, training in was_training.items():
            module.training = training


def _find(model: nn.Module, name: str) -> nn.Module:
    modules = {key: module for key, module in model.named_modules() if key}
    if name in modules:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=3)
    top = [key for key in modules if "." not in key]
    raise UserError(
        f"taps: the model {type(model).__name__} has no module {name!r}"
        f"{'; did you mean ' + ' or '.join(close) + '?' if close else ''} (top level: {_shortened(top)})"
    )


def _not_a_map(model: nn.Module, name: str, output: Any, image_size: int) -> str:
    found = f"gives a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"gives {type(output).__name__}"
    everything = _outputs_of(model, [key for key, _ in model.named_modules() if key], image_size)
    maps = [key for key, value in everything.items() if isinstance(value, Tensor) and value.dim() == 4]
    maps = [key for key in maps if "." not in key] or maps
    advice = f"use one of {_shortened(maps)}" if maps else "this model has none (token models cannot be tapped yet)"
    return f"taps: {name!r} of {type(model).__name__} is no feature map [batch, channels, height, width] (it {found}); {advice}"


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f", ... {len(names) - _LISTED} more" if len(names) > _LISTED else "")
