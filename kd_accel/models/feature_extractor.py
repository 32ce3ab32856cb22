"""Feature extraction: outputs of named modules as maps, recorded by forward hooks during the model's own forward.

Tokens of transformers and channels-last outputs become maps [B, D, H, W] here, by `maps.as_map`, and nowhere else.

The model is not changed, and no second forward is needed. `FeatureExtractor` registers its hooks when it is opened and removes
all of them when it is closed, also after an error. A model must be compiled after its extractor is opened; see
`compile_with_hooks`.

Shapes: B batch, D channels, H height, W width.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from kd_accel.errors import UserError, describe_error
from kd_accel.models.maps import as_map, prefix_tokens
from kd_accel.models.modes import in_evaluation_mode

_MAX_LISTED = 12
_PROBED_IMAGES = 2
_IMAGE_CHANNELS = 3
_MOVERS = {
    "PatchDropout": "are dropped at random in training, so that they form no map (leave out patch_drop_rate)",
    "PatchDropoutWithIndices": "are dropped at random in training, so that they form no map (leave out patch_drop_rate)",
    "Unroll": "are not in the order of the image",
}
"""Modules of timm after which tokens are not the pixels of a map, row by row, by the name of their class."""


class FeatureExtractor:
    """Recorder of the feature maps of named layers, active between `open` and `close` or as a context manager.

    Args:
        model: Network that contains the layers, for square images.
        names: Names of the layers, as in `model.named_modules()`.
        field: Config key or argument that lists the layers, for error messages.

    Raises:
        UserError: If a name is not a module of the model.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, field: str = "layers") -> None:
        self._modules = {name: find_module(model, name, field) for name in names}
        self._prefixes = prefix_tokens(model, names)
        self._handles: list[Any] = []
        self._features: dict[str, Tensor] = {}

    def open(self) -> FeatureExtractor:
        """Register the forward hooks, unless it is open already, and return the extractor."""
        for name, module in () if self._handles else self._modules.items():
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

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureExtractor:
        """Copy the extractor together with its network, to record the maps of the copy if this one is open."""
        other = FeatureExtractor.__new__(FeatureExtractor)
        memo[id(self)] = other
        other._modules, other._prefixes = copy.deepcopy(self._modules, memo), dict(self._prefixes)
        other._handles, other._features = [], {}
        for module in other._modules.values():
            without_recorders(module)
        return other.open() if self._handles else other

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        prefix = self._prefixes[name]

        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            feature = as_map(output, prefix)
            if feature is None:
                raise ValueError(f"layers: {name!r} is not a feature map or the tokens of one: it {_described(output)}")
            self._features[name] = feature

        record.is_recorder = True  # type: ignore[attr-defined]
        return record


def without_recorders(model: nn.Module) -> nn.Module:
    """Remove the hooks of an extractor from a copy of its network, in place: they would record for the original."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "is_recorder", False):
                del module._forward_hooks[key]
    return model


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
    modules = {name: find_module(model, name, field) for name in names}
    outputs = _record_outputs(model, modules, image_size)
    unusable = _unusable(model, outputs, image_size)
    for name in names:
        if name not in outputs or name in unusable:
            raise UserError(_explain_unusable(model, name, unusable.get(name), image_size, field))
    return {name: outputs[name].shape for name in names}


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
    unusable = _unusable(model, outputs, image_size)
    return {name: output.shape for name, output in outputs.items() if name not in unusable}


_REMEDY = (
    "use another arch, fix the function that builds the model, or turn off auxiliary heads if it has any, for example with "
    "model.arch_args: {aux_logits: false}"
)


def probe_logits(
    model: nn.Module, *, num_classes: int, image_size: int, field: str = "model.arch", remedy: str = _REMEDY
) -> None:
    """Check with one forward that a model outputs logits [B, num_classes].

    Args:
        model: Network to check; it is not changed.
        num_classes: Expected number of logits.
        image_size: Height and width of the images, in pixels.
        field: Setting or argument that the model comes from, for the message.
        remedy: What the user can do.

    Raises:
        UserError: If the model does not accept images of this size, or its output has another type or shape.
    """
    section = "data" if field == "model.arch" else field
    output = _record_outputs(model, {"": model}, image_size, section=section)[""].value
    expected = (_PROBED_IMAGES, num_classes)
    if not isinstance(output, Tensor) or output.shape != expected:
        actual = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            f"{field}: {type(model).__name__} returns {actual} for {_PROBED_IMAGES} images, expected logits of shape "
            f"{expected}, one per class; {remedy}"
        )


def check_teacher_size(model: nn.Module, image_size: int) -> None:
    """Check with one forward that a teacher accepts images.

    Args:
        model: Network of the teacher; it is not changed.
        image_size: Height and width of the images, in pixels.

    Raises:
        UserError: If the model does not accept images of this size.
    """
    _record_outputs(model, {}, image_size, section="teacher")


@dataclass(frozen=True)
class _Output:
    """Output of a module for square images.

    Attributes:
        value: The output.
        version: Its `_version`, PyTorch's count of in-place writes, at the time of the hook.
        feature: The output as a feature map; None if it is not one.
    """

    value: Any
    version: int
    feature: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (D, H, W) of the feature map."""
        assert self.feature is not None
        _, channels, height, width = self.feature.shape
        return channels, height, width

    @property
    def is_map(self) -> bool:
        """True for a feature map of each image, which is as square as the images."""
        feature = self.feature
        return feature is not None and len(feature) == _PROBED_IMAGES and feature.shape[2] == feature.shape[3]

    @property
    def is_overwritten(self) -> bool:
        """True if a later module has changed the output in place."""
        return isinstance(self.value, Tensor) and self.value._version != self.version

    @property
    def is_ambiguous(self) -> bool:
        """True if the sizes do not show which dimension has the channels."""
        return isinstance(self.value, Tensor) and self.value.dim() == 4 and len(set(self.value.shape[1:])) == 1


def _described(output: Any) -> str:
    """Describe the type or shape of an output, for error messages."""
    return (
        f"returns a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"returns {type(output).__name__}"
    )


def _unusable(model: nn.Module, outputs: Mapping[str, _Output], image_size: int) -> dict[str, str]:
    """Return the reason for each output that is not a feature map, or not a reliable one."""
    reasons = {}
    ambiguous = [name for name, output in outputs.items() if output.is_ambiguous]
    last = _channels_last(model, ambiguous, image_size) if ambiguous else set()
    mover = next((type(module).__name__ for module in model.modules() if type(module).__name__ in _MOVERS), None)
    for name, output in outputs.items():
        if not output.is_map:
            reasons[name] = f"is not a feature map [batch, channels, height, width] (it {_described(output.value)})"
        elif output.is_overwritten:
            reasons[name] = "has an output that a later module overwrites in place"
        elif name in last:
            reasons[name] = f"is channels last with as many channels as columns ({output.shape[0]}), which cannot be told apart"
        elif mover and output.value.dim() == 3:
            reasons[name] = f"has tokens that {_MOVERS[mover]}"
    return reasons


def _channels_last(model: nn.Module, names: Sequence[str], image_size: int) -> set[str]:
    """Return those of the layers with H = W = D whose channels are last, as images of twice the width show.

    A model for one size of images counts as channels first, PyTorch's convention, unless timm's `output_fmt` is NHWC.
    """
    modules = {name: module for name, module in _named_submodules(model).items() if name in names}
    try:
        outputs = _record_outputs(model, modules, image_size, width=2 * image_size)
    except UserError:
        return set(names) if getattr(model, "output_fmt", None) == "NHWC" else set()
    shapes = {name: output.value.shape for name, output in outputs.items() if isinstance(output.value, Tensor)}
    return {name for name, shape in shapes.items() if len(shape) == 4 and shape[2] > shape[3]}


@torch.no_grad()
def _record_outputs(
    model: nn.Module, modules: dict[str, nn.Module], image_size: int, *, width: int | None = None, section: str = "data"
) -> dict[str, _Output]:
    """Run one forward in evaluation mode and return the last output of each module that ran.

    section: section of the config with the image size, for messages.
    """
    outputs: dict[str, _Output] = {}
    prefixes = prefix_tokens(model, list(modules))

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            version = output._version if isinstance(output, Tensor) else 0
            outputs[name] = _Output(output, version, as_map(output, prefixes[name]))

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with in_evaluation_mode(model), torch.random.fork_rng(devices=[]):
            device = next((parameter.device for parameter in model.parameters()), None)
            model(torch.zeros(_PROBED_IMAGES, _IMAGE_CHANNELS, image_size, width or image_size, device=device))
    except UserError:
        raise
    except Exception as error:  # the model's own code can raise any exception
        raise UserError(_explain_refusal(model, image_size, describe_error(error), section)) from None
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _explain_refusal(model: nn.Module, image_size: int, reason: str, section: str) -> str:
    """Return the error message for a network that does not accept the images."""
    name = type(model).__name__
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), _IMAGE_CHANNELS)
    if channels != _IMAGE_CHANNELS:
        return (
            f"arch_args: {name} takes images of {channels} channels, but images have {_IMAGE_CHANNELS} (red, green, blue; gray "
            f"ones are repeated); set in_chans to {_IMAGE_CHANNELS} or leave it out"
        )
    arguments = inspect.signature(type(model).__init__).parameters
    sizes = [argument for argument in ("img_size", "image_size") if argument in arguments]
    argument = f"arch_args: {{{sizes[0]}: {image_size}}}" if sizes else ""
    if section == "teacher":
        remedy = f"set it to the size for which the network is built{argument and f', or teacher.{argument}'}"
    else:
        remedy = f"{argument and f'set {argument}, or '}choose another size or arch"
    return f"{section}.image_size: {name} does not accept images of {image_size}x{image_size} pixels ({reason}); {remedy}"


def find_module(model: nn.Module, name: str, field: str) -> nn.Module:
    """Return the module of a name. Raises UserError, with the nearest names, if the model has no such module.

    Args:
        model: Network that contains the module.
        name: Name of the module, as in `model.named_modules()`.
        field: Config key or argument that has the name, for the message.
    """
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


def _explain_unusable(model: nn.Module, name: str, reason: str | None, image_size: int, field: str) -> str:
    """Return the error message for a layer that cannot be recorded, with a list of layers that can be recorded."""
    maps = list(feature_maps(model, image_size=image_size))
    top_level = [key for key in maps if "." not in key] or maps
    remedy = f"use one of {_abbreviate(top_level)}" if maps else "this model has no feature maps; use another arch"
    return f"{field}: {name!r} of {type(model).__name__} {reason or 'is not executed in a forward pass'}; {remedy}"


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (f", ... {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else "")
