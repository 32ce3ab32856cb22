"""Recording what named modules give, without changing the model and without a second forward.

A recorder hangs forward hooks on the recorded modules while it is open and takes every one of them away when it closes, whatever
happened in between. A compiled model must be compiled after the recorder was opened.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.errors import UserError

_LISTED = 12
_PROBED_IMAGES = 2
_FIELD = "distill.feature.layers"


class FeatureExtractor:
    """While open, each forward of `model` leaves the outputs of the named modules here, to be taken once."""

    def __init__(self, model: nn.Module, names: Sequence[str], *, field: str = _FIELD) -> None:
        """Raises UserError for a name that the model does not have; it lists what there is."""
        self._modules = {name: _find(model, name, field) for name in names}
        self._handles: list[Any] = []
        self._features: dict[str, Tensor] = {}

    def open(self) -> FeatureExtractor:
        assert not self._handles, "the recorder is open already"
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def close(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._features = {}

    def take(self) -> dict[str, Tensor]:
        """The features [B, D, H, W] of the latest forward, by layer; forgets them."""
        features, self._features = self._features, {}
        return features

    def __enter__(self) -> FeatureExtractor:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            self._features[name] = output

        return record


def compile_with_hooks(model: nn.Module) -> None:
    """`model.compile()` for a model whose recorder is open.

    torch takes it for granted that hooks do not change, and runs what it compiled for one model for another of the same class,
    whose hooks would be passed over; this makes it look.
    """
    from torch._dynamo import config  # heavy, and not needed otherwise

    config.skip_nnmodule_hook_guards = False
    model.compile()


@dataclass(frozen=True)
class _Seen:
    """An output as its module gave it; torch counts in `_version` how often a tensor has been written to."""

    output: Any
    version: int

    @property
    def is_map(self) -> bool:
        """Of a square image: channels-last outputs and attention weights have another height than width there."""
        return isinstance(self.output, Tensor) and self.output.dim() == 4 and self.output.shape[2] == self.output.shape[3]

    @property
    def is_overwritten(self) -> bool:
        return isinstance(self.output, Tensor) and self.output._version != self.version

    @property
    def words(self) -> str:
        if not isinstance(self.output, Tensor):
            return f"gives {type(self.output).__name__}"
        kind = {3: ", the tokens of a transformer: not supported", 4: ", channels last: not supported"}
        return f"gives a tensor of shape {tuple(self.output.shape)}{kind.get(self.output.dim(), '')}"


def probe_layers(
    model: nn.Module, names: Sequence[str], *, image_size: int, field: str = _FIELD
) -> dict[str, tuple[int, int, int]]:
    """(D, H, W) of each layer for square images of `image_size` pixels. The model and the global generator stay as they are.

    field: the setting that names the layers, for messages. Raises UserError for a layer that is not there, is no feature map, does
    not run, or is overwritten in place by a later module; it lists modules that can be recorded. Raises UserError too for a
    model that cannot take images of this size.
    """
    modules = {name: _find(model, name, field) for name in names}
    seen = _see(model, modules, image_size)
    for name in names:
        if name not in seen or not seen[name].is_map or seen[name].is_overwritten:
            raise UserError(_refusal(model, name, seen.get(name), image_size, field))
    return {name: tuple(seen[name].output.shape[1:]) for name in names}


def probe_logits(model: nn.Module, *, num_classes: int, image_size: int) -> None:
    """Raises UserError for a model that cannot take images of `image_size` pixels, or gives no logits [B, num_classes]."""
    output = _see(model, {"": model}, image_size)[""].output
    request = (_PROBED_IMAGES, num_classes)
    if not isinstance(output, Tensor) or output.shape != request:
        given = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"model.arch: {type(model).__name__} gives {given} for {_PROBED_IMAGES} images, not logits of shape {request}, one "
            "for each class; use another arch, or mend the function that builds it"
        )


@torch.no_grad()
def _see(model: nn.Module, modules: dict[str, nn.Module], image_size: int) -> dict[str, _Seen]:
    """One forward in evaluation mode: what each module gave last."""
    seen: dict[str, _Seen] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = _Seen(output, output._version if isinstance(output, Tensor) else 0)

        return record

    was_training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            device = next((parameter.device for parameter in model.parameters()), None)
            model(torch.zeros(_PROBED_IMAGES, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"data.image_size: {type(model).__name__} cannot take images of {image_size} pixels ({said}); choose another size "
            "or arch"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    return seen


def _find(model: nn.Module, name: str, field: str) -> nn.Module:
    modules = _named(model)
    if name in modules:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=3)
    top = [key for key in modules if "." not in key]
    raise UserError(
        f"{field}: the model {type(model).__name__} has no module {name!r}"
        f"{'; did you mean ' + ' or '.join(close) + '?' if close else ''} (top level: {_shortened(top)})"
    )


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return {key: module for key, module in model.named_modules() if key}


def _refusal(model: nn.Module, name: str, seen: _Seen | None, image_size: int, field: str) -> str:
    everything = _see(model, _named(model), image_size)
    maps = [key for key, value in everything.items() if value.is_map and not value.is_overwritten]
    top = [key for key in maps if "." not in key] or maps
    advice = f"use one of {_shortened(top)}" if maps else "this model has none"
    where = f"{field}: {name!r} of {type(model).__name__}"
    if seen is None:
        return f"{where} does not run in a forward pass; {advice}"
    if seen.is_map:
        return f"{where} is overwritten in place by a module that follows, so what it gave is lost; {advice}"
    return f"{where} is no feature map [batch, channels, height, width] (it {seen.words}); {advice}"


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f", ... {len(names) - _LISTED} more" if len(names) > _LISTED else "")
