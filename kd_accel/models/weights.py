"""Model files of a run, and pretrained weights from files, torchvision or timm.

A saved model consists of `model.safetensors`, with the state dict keys of torchvision, timm or user code, and `model.json`,
with its architecture and preprocessing (`card.py`). Files passed by a user are never unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_accel.errors import UserError, describe_error
from kd_accel.io.files import is_directory, write_whole
from kd_accel.io.tensors import read_tensors
from kd_accel.io.user_code import import_problem
from kd_accel.models.card import ModelCard as ModelCard
from kd_accel.models.card import load_card as load_card
from kd_accel.models.factory import build_model


def save_model(directory: Path, model: nn.Module, *, card: ModelCard) -> None:
    """Write `model.safetensors` and `model.json`, each atomically.

    Args:
        directory: Existing directory, usually a run directory.
        model: Network whose state dict is written.
        card: Description of the network.

    Raises:
        UserError: If a file cannot be written; the previous file is then kept.
    """
    save_weights(directory / "model.safetensors", model.state_dict())
    text = json.dumps(asdict(card), indent=2) + "\n"
    with _write_errors_explained(directory):
        write_whole(directory / "model.json", lambda path: path.write_text(text, encoding="utf-8"))


def save_weights(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write the state dict of a network as a safetensors file, atomically.

    Args:
        path: File in an existing directory.
        state: State dict on any device; tied parameters are written under each of their names.

    Raises:
        UserError: If the file cannot be written; the previous file is then kept.
    """
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    with _write_errors_explained(path.parent):
        write_whole(path, lambda temporary: save_file(tensors, temporary))


@contextmanager
def _write_errors_explained(directory: Path) -> Iterator[None]:
    """Inside the `with` block, turn the errors of a failed write into UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the model to {directory} ({error}); check that the directory exists, is writable and has free "
            "space, then run the command again"
        ) from None


def load_run_model(directory: Path, *, field: str = "model") -> tuple[nn.Module, ModelCard]:
    """Load the model of a finished run.

    Args:
        directory: Run directory.
        field: Config section or argument that contains the directory, for error messages.

    Returns:
        The network, in evaluation mode on the CPU, and its card.

    Raises:
        UserError: If the run is not finished, its files are damaged, or it uses user code that is not allowed to run.
    """
    card = load_card(directory)
    if problem := import_problem(card.arch, field=field, where=str(directory / "model.json")):
        raise UserError(problem)
    model = build_model(card.arch, num_classes=len(card.label_names), stem=card.stem, arch_args=card.arch_args, field=field)
    load_weights(model, str(directory), arch=card.arch, is_exact=True, field=field)
    return model.eval(), card


def load_weights(model: nn.Module, weights: str, *, arch: str, is_exact: bool, field: str = "model") -> list[str]:
    """Load weights into a model, from a run directory, a `.safetensors` file, torchvision or timm.

    Args:
        model: Network to load into, on the CPU.
        weights: Path, name of torchvision weights such as `IMAGENET1K_V2`, or pretrained tag of timm.
        arch: Name of the network's architecture.
        is_exact: Whether all tensors must match, as for a teacher. If False, a classifier or stem of another shape keeps its
            random weights, as in fine-tuning on other classes.
        field: Config section of the weights, for error messages.

    Returns:
        A notice for each module that keeps its random weights.

    Raises:
        UserError: If the weights cannot be read or do not fit the model.
    """
    loaded = _read_weights(weights, model, arch=arch, section=field)
    tensors = {key: tensor for key, tensor in loaded.items() if not key.startswith(_AUXILIARY_HEADS.get(arch, ()))}
    state = model.state_dict()
    tied = _tied_keys(state)
    if different := _complete_tied(tensors, tied):
        raise UserError(
            f"{field}.weights: {weights} has different values of {' and '.join(different)}, which are one parameter of {arch}; "
            "use weights of a model that shares this parameter, too"
        )
    mismatch = _compare(state, tensors)
    if mismatch == _Mismatch([], [], []):
        return _copy(state, tensors, [])
    replaceable = set() if is_exact else _with_tied_modules(_stem_and_classifier(state), tied)
    if {_module_of(key) for key in mismatch.all_keys} <= replaceable:
        return _copy(state, tensors, sorted({_module_of(key) for key in [*mismatch.missing, *mismatch.misshapen]}))
    raise UserError(f"{field}.weights: {_explain_mismatch(weights, arch, state, tensors, mismatch)}")


def count_classes(model: nn.Module, weights: str, *, arch: str, field: str = "model") -> int:
    """Count the classes of weights by the rows of their classifier.

    Args:
        model: Network of the architecture, with any number of classes.
        weights: Weights as in `load_weights`.
        arch: Name of the network's architecture.
        field: Config section of the weights, for error messages.

    Raises:
        UserError: If the weights cannot be read.
    """
    loaded, state = _read_weights(weights, model, arch=arch, section=field), model.state_dict()
    classifier = [key for key, tensor in state.items() if tensor.dim() >= 2][-1]
    return loaded.get(classifier, state[classifier]).shape[0]


@dataclass(frozen=True)
class _Mismatch:
    """State dict keys in which weights differ from a model: missing, unexpected, or of another shape."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def all_keys(self) -> list[str]:
        return [*self.missing, *self.unexpected, *self.misshapen]


def _compare(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> _Mismatch:
    """Compare weights with a model's state dict. BatchNorm's batch counters may be missing, because many files omit them."""
    return _Mismatch(
        missing=[key for key in state if key not in tensors and not key.endswith("num_batches_tracked")],
        unexpected=[key for key in tensors if key not in state],
        misshapen=[key for key in state if key in tensors and state[key].shape != tensors[key].shape],
    )


def _tied_keys(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the groups of state dict keys that are one parameter under several names."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), []).append(key)
    return [keys for keys in groups.values() if len(keys) > 1 and state[keys[0]].numel()]


def _complete_tied(tensors: dict[str, Tensor], tied: list[list[str]]) -> list[str]:
    """Add the missing names of tied parameters in place, because `safetensors.torch.save_model` writes one name of each.

    Returns:
        The names of a tied parameter with different values; empty if all values agree.
    """
    for keys in tied:
        given = [key for key in keys if key in tensors]
        if any(not torch.equal(tensors[given[0]], tensors[key]) for key in given[1:]):
            return given
        tensors.update({key: tensors[given[0]] for key in keys if given})
    return []


def _with_tied_modules(modules: list[str], tied: list[list[str]]) -> set[str]:
    """Return the modules, and those that share a parameter with one of them."""
    sharing = [{_module_of(key) for key in keys} for keys in tied]
    return set(modules).union(*(group for group in sharing if group & set(modules)))


def _read_weights(weights: str, model: nn.Module, *, arch: str, section: str) -> dict[str, Tensor]:
    path, field = Path(weights), f"{section}.weights"
    if is_directory(path):
        load_card(path)
        return _read_safetensors(path / "model.safetensors", field)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, field)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise UserError(
            f"{field}: {weights} is a pickle file, which can run arbitrary code when it is loaded; convert it with "
            "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        )
    if "/" in weights:
        raise UserError(f"{field}: run directory {weights!r} not found; train it first, or check the path")
    if arch in _AUXILIARY_HEADS and not getattr(model, "transform_input", True):
        raise UserError(
            f"{field}: {weights} of {arch} was trained with transform_input, so the model needs it too; "
            f"set {section}.arch_args: {{transform_input: true}}"
        )
    with torch.random.fork_rng(devices=[]):
        return _library_weights(weights, arch, field)


_AUXILIARY_HEADS = {"torchvision/googlenet": ("aux1.", "aux2."), "torchvision/inception_v3": ("AuxLogits.",)}
"""Key prefixes of the auxiliary classifiers, which `build_model` omits, by architecture."""


def _read_safetensors(path: Path, field: str) -> dict[str, Tensor]:
    try:
        tensors = read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{field}: file {path} not found; check the path, or train the run again") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{field}: {path} is damaged or not a safetensors file ({error}); use another file") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{field}: {key} in {path} contains values that are not finite; use other weights")
    return tensors


def _library_weights(name: str, arch: str, field: str) -> dict[str, Tensor]:
    library, _, model_name = arch.partition("/")
    try:
        if library == "torchvision":
            from torchvision import models

            known_weights = models.get_model_weights(model_name)[name]
            # Through the model, not its file: torchvision renames keys of older files while it loads them.
            return models.get_model(model_name, weights=known_weights, progress=False).state_dict()
        if library == "timm":
            import timm

            tagged = model_name if name == "pretrained" else f"{model_name}.{name}"
            return timm.create_model(tagged, pretrained=True).state_dict()
    except KeyError:
        known = ", ".join(models.get_model_weights(model_name).__members__)
        raise UserError(f"{field}: {arch} has no weights {name!r}; use one of {known}") from None
    except Exception as error:
        # Each HTTP client raises its own exceptions without network access or for an unknown name.
        raise UserError(
            f"{field}: cannot download {name!r} of {arch} ({describe_error(error)}); without network access use a .safetensors "
            "file, or null for random initial weights"
        ) from None
    raise UserError(
        f"{field}: {name!r} is neither a run directory nor a .safetensors file, and {arch} has no weights by name; use a run "
        "directory, a .safetensors file, or null for random initial weights"
    )


def _stem_and_classifier(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the first and the last module with a weight of two or more dimensions.

    Tensors of the network itself, such as the position embedding of a vision transformer, come first.
    """
    weights = [key for key, tensor in state.items() if tensor.dim() >= 2]
    of_modules = [key for key in weights if "." in key]
    ends = [of_modules[0], of_modules[-1]] if of_modules else []
    return [*(key for key in weights if "." not in key), *map(_module_of, ends)]


def _module_of(key: str) -> str:
    """Return the module of a tensor; a tensor of the network itself stands alone, by its own name."""
    return key.rpartition(".")[0] or key


def _copy(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], replaced: list[str]) -> list[str]:
    """Copy tensors into a state dict, except those of the replaced modules, and return a notice for each replaced module."""
    with torch.no_grad():
        for key, tensor in tensors.items():
            if key in state and _module_of(key) not in replaced:
                state[key].copy_(tensor)
    return [f"{name}: starts from random weights, because the loaded weights do not match its shape" for name in replaced]


def _explain_mismatch(
    weights: str, arch: str, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], mismatch: _Mismatch
) -> str:
    """Return the error message for weights that do not fit a model."""
    is_classifier = {_module_of(key) for key in mismatch.all_keys} == set(_stem_and_classifier(state)[1:])
    if mismatch.misshapen == mismatch.all_keys and is_classifier:
        key = mismatch.misshapen[0]
        return (
            f"{weights} has {tensors[key].shape[0]} classes ({key}), expected {state[key].shape[0]}; use weights trained on "
            "the same classes, or for a teacher set teacher.class_map to its class for each class of the data"
        )
    differences = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (
            ("missing", mismatch.missing),
            ("unexpected", mismatch.unexpected),
            ("of another shape", mismatch.misshapen),
        )
        if keys
    ]
    return (
        f"{weights} does not fit {arch}; tensors: {', '.join(differences)}; set arch and stem to those with which the "
        f"weights were trained{_trained_with(Path(weights))}"
    )


def _trained_with(path: Path) -> str:
    """Return the architecture and stem of weights with a model card, as the end of a message; else an empty string."""
    directory = path if path.is_dir() else path.parent
    if not path.exists() or not (directory / "model.json").is_file():
        return ""
    card = load_card(directory)
    return f": {card.arch}, stem {card.stem}"
