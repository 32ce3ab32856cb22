"""Feature extraction: outputs of named modules, recorded by forward hooks during the model's own forward.

The model is not changed, and no second forward is needed. `FeatureExtractor` registers its hooks when it is opened and removes
all of them when it is closed, also after an error. A model must be compiled after its extractor is opened; see
`compile_with_hooks`.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.errors import UserError, describe_error

_MAX_LISTED = 12
_PROBED_IMAGES = 2


class FeatureExtractor:
    """Recorder of the outputs of named layers, active between `open` and `close` or as a context manager.

    Args:
        model: Network that contains the layers.
        names: Names of the layers, as in `model.named_modules()`.
        field: Config key or argument that lists the layers, for error messages.

    Raises:
        UserError: If a name is not a module of the model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, field: str = "layers") -> None:
        self._modules = {name: _find(model, name, field) for name in names}
        self._handles: list[Any] = []
        self._features: dict[str, Tensor] = {}

    def open(self) -> FeatureExtractor:
        """Register the forward hooks and return the extractor."""
        assert not self._handles, "the feature extractor is already open"
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def close(self) -> None:
        """Remove the forward hooks and drop the recorded features."""
        while self._handles:
            self._handles.pop().remove()
        self._features = {}

    def take(self) -> dict[str, Tensor]:
        """Return the features [B, D, H, W] of the latest forward by layer, and drop the references to them."""
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


def compile_with_hooks(model: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile a model in place while its feature extractor is open.

    By default torch.compile assumes that hooks never change. It would reuse the compiled code of one model for another model of
    the same class, without the second model's hooks. This function enables the guards on hooks.

    Args:
        model: The model.
        dynamic: Whether one graph serves batches of any size. If not, the model is compiled for each size. None = from the
            second size on, also if that is the first size of another model of the same class.
    """
    # Imported late because torch._dynamo is slow to import.
    from torch._dynamo import config

    config.skip_nnmodule_hook_guards = False
    model.compile(dynamic=dynamic)


def probe_layers(
    model: nn.Module, names: Sequence[str], *, image_size: int, field: str = "layers"
) -> dict[str, tuple[int, int, int]]:
    """Determine the feature shapes of layers with one forward, and check that each layer can be recorded.

    The forward leaves the model, its training modes and the global random generator unchanged.

    Args:
        model: Network that contains the layers.
        names: Names of the layers, as in `model.named_modules()`.
        image_size: Height and width of the images, in pixels.
        field: Config key or argument that lists the layers, for error messages.

    Returns:
        Feature shape (D, H, W) by layer.

    Raises:
        UserError: If a layer does not exist, does not run or does not output a feature map, if its output is overwritten in
            place by a later module, or if the model does not accept images of this size. The message lists valid layers.
    """
    modules = {name: _find(model, name, field) for name in names}
    outputs = _record_outputs(model, modules, image_size)
    for name in names:
        if name not in outputs or not outputs[name].is_map or outputs[name].is_overwritten:
            raise UserError(_explain_unusable(model, name, outputs.get(name), image_size, field))
    return {name: tuple(outputs[name].value.shape[1:]) for name in names}


def feature_maps(model: nn.Module, *, image_size: int) -> dict[str, tuple[int, int, int]]:
    """Determine all layers that can be recorded and their feature shapes, in the order of execution.

    Args:
        model: Network; it is not changed.
        image_size: Height and width of the images, in pixels.

    Returns:
        Feature shape (D, H, W) by layer.

    Raises:
        UserError: If the model does not accept images of this size.
    """
    outputs = _record_outputs(model, _named_submodules(model), image_size)
    return {name: tuple(out.value.shape[1:]) for name, out in outputs.items() if out.is_map and not out.is_overwritten}


def probe_logits(model: nn.Module, *, num_classes: int, image_size: int) -> None:
    """Check with one forward that a model outputs logits [B, num_classes].

    Args:
        model: Network to check; it is not changed.
        num_classes: Expected number of logits.
        image_size: Height and width of the images, in pixels.

    Raises:
        UserError: If the model does not accept images of this size, or its output has another type or shape.
    """
    output = _record_outputs(model, {"": model}, image_size)[""].value
    expected = (_PROBED_IMAGES, num_classes)
    if not isinstance(output, Tensor) or output.shape != expected:
        actual = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"model.arch: {type(model).__name__} returns {actual} for {_PROBED_IMAGES} images, expected logits of shape "
            f"{expected}, one per class; use another arch, or fix the function that builds the model"
        )


@dataclass(frozen=True)
class _Output:
    """Output of a module together with its `_version`, PyTorch's count of in-place writes, at the time of the hook."""

    value: Any
    version: int

    @property
    def is_map(self) -> bool:
        """True if the output is a feature map [B, D, H, W] of a square image.

        Equal sizes of dimensions 2 and 3 exclude channels-last outputs [B, H, W, D], except those with W = D.
        """
        return isinstance(self.value, Tensor) and self.value.dim() == 4 and self.value.shape[2] == self.value.shape[3]

    @property
    def is_overwritten(self) -> bool:
        return isinstance(self.value, Tensor) and self.value._version != self.version

    @property
    def description(self) -> str:
        """Type or shape of the output, for error messages."""
        if not isinstance(self.value, Tensor):
            return f"returns {type(self.value).__name__}"
        kind = {3: ", transformer tokens, which are not supported", 4: ", channels last, which is not supported"}
        return f"returns a tensor of shape {tuple(self.value.shape)}{kind.get(self.value.dim(), '')}"


@torch.no_grad()
def _record_outputs(model: nn.Module, modules: dict[str, nn.Module], image_size: int) -> dict[str, _Output]:
    """Run one forward in evaluation mode and return the last output of each module that ran."""
    outputs: dict[str, _Output] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = _Output(output, output._version if isinstance(output, Tensor) else 0)

        return record

    was_training = {module: module.training for module in model.modules()}
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            device = next((parameter.device for parameter in model.parameters()), None)
            model(torch.zeros(_PROBED_IMAGES, 3, image_size, image_size, device=device))
    except (RuntimeError, AssertionError) as error:
        reason = describe_error(error)
        raise UserError(
            f"data.image_size: {type(model).__name__} does not accept images of {image_size}x{image_size} pixels ({reason}); "
            "choose another size or arch"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
        for module, training in was_training.items():
            module.training = training
    return outputs


def _find(model: nn.Module, name: str, field: str) -> nn.Module:
    modules = _named_submodules(model)
    if name in modules:
        return modules[name]
    close = difflib.get_close_matches(name, modules, n=3)
    top_level = [key for key in modules if "." not in key]
    raise UserError(
        f"{field}: {type(model).__name__} has no module {name!r}; "
        f"{'did you mean ' + ' or '.join(close) + '? ' if close else 'use another layer '}(top level: {_abbreviate(top_level)})"
    )


def _named_submodules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name}


def _explain_unusable(model: nn.Module, name: str, output: _Output | None, image_size: int, field: str) -> str:
    """Return the error message for a layer that cannot be recorded, with a list of layers that can be recorded."""
    outputs = _record_outputs(model, _named_submodules(model), image_size)
    maps = [key for key, value in outputs.items() if value.is_map and not value.is_overwritten]
    top_level = [key for key in maps if "." not in key] or maps
    remedy = f"use one of {_abbreviate(top_level)}" if maps else "this model has no feature maps; use another arch"
    layer = f"{field}: {name!r} of {type(model).__name__}"
    if output is None:
        return f"{layer} is not executed in a forward pass; {remedy}"
    if output.is_map:
        return f"{layer} has an output that a later module overwrites in place; {remedy}"
    return f"{layer} is not a feature map [batch, channels, height, width] (it {output.description}); {remedy}"


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (f", ... {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else "")
