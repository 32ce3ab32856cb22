"""Model files: what a run leaves to be deployed, and weights that come from elsewhere.

A model is `model.safetensors` with the library's own keys and `model.json` (ModelCard) with what is needed to use it. Nothing
that a user passes in is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_accel.config.schema import MAX_IMAGE_SIZE, Stem
from kd_accel.errors import UserError
from kd_accel.io.files import read_json, write_whole
from kd_accel.io.tensors import read_tensors
from kd_accel.io.user_code import import_problem
from kd_accel.models.factory import build_model


@dataclass(frozen=True)
class ModelCard:
    """How to rebuild and feed a saved model. mean and std: per channel, in 0..1. image_size: pixels."""

    arch: str
    stem: Stem
    arch_args: dict[str, Any]
    label_names: list[str]
    mean: list[float]
    std: list[float]
    image_size: int


def save_model(directory: Path, model: nn.Module, *, card: ModelCard) -> None:
    """Write model.safetensors and model.json, each whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    text = json.dumps(asdict(card), indent=2) + "\n"
    try:
        write_whole(directory / "model.safetensors", lambda path: save_file(tensors, path))
        write_whole(directory / "model.json", lambda path: path.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the model to {directory} ({error}); see that the directory is there and has space, and start again"
        ) from None


def load_card(directory: Path) -> ModelCard:
    """model.json of a run directory. Raises UserError for an empty, damaged or missing one."""
    path = directory / "model.json"
    content = read_json(path, remedy="no finished run there; train it first, or name another directory")
    wrong = [name for name, is_valid in _VALID.items() if not is_valid(content.get(name))]
    if wrong:
        raise UserError(f"{path}: damaged ({', '.join(wrong)} wrong or missing); train the run again")
    return ModelCard(**{field.name: content[field.name] for field in fields(ModelCard)})


def _are_three(values: Any, *, above: float) -> bool:
    """One finite number per color."""
    return isinstance(values, list) and len(values) == 3 and all(_is_number(v) and above < v < float("inf") for v in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_VALID: dict[str, Callable[[Any], bool]] = {
    "arch": lambda value: isinstance(value, str),
    "stem": lambda value: value in get_args(Stem),
    "arch_args": lambda value: isinstance(value, dict),
    "label_names": lambda value: isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value),
    "mean": lambda value: _are_three(value, above=float("-inf")),
    "std": lambda value: _are_three(value, above=0),
    "image_size": lambda value: _is_number(value) and isinstance(value, int) and 0 < value <= MAX_IMAGE_SIZE,
}


def load_run_model(directory: Path, *, field: str = "model") -> tuple[nn.Module, ModelCard]:
    """The model of a finished run, in evaluation mode on the CPU, and its card."""
    card = load_card(directory)
    if problem := import_problem(card.arch, field=field, where=str(directory / "model.json")):
        raise UserError(problem)
    model = build_model(card.arch, num_classes=len(card.label_names), stem=card.stem, arch_args=card.arch_args, field=field)
    load_weights(model, str(directory), arch=card.arch, is_exact=True, field=field)
    return model.eval(), card


def load_weights(model: nn.Module, weights: str, *, arch: str, is_exact: bool, field: str = "model") -> list[str]:
    """Fill a model from a run directory, a .safetensors file, or weights that the library knows by name.

    is_exact: every tensor must fit (a teacher). Otherwise a classifier or stem of another shape keeps its fresh values, and
    the returned notices say so (fine-tuning onto other classes). Raises UserError for anything else that does not fit.
    """
    read = _read_weights(weights, model, arch=arch, section=field)
    tensors = {name: tensor for name, tensor in read.items() if not name.startswith(_AUXILIARY_HEADS.get(arch, ()))}
    own = model.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in tensors and name not in optional]
    unknown = [name for name in tensors if name not in own]
    misshapen = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if not missing and not unknown and not misshapen:
        return _copied(model, tensors, [])
    replaceable = set() if is_exact else _classifier_and_stem(own)
    if (set(missing) | set(misshapen)) <= replaceable and all(_head_of(name) in _heads(replaceable) for name in unknown):
        return _copied(model, tensors, sorted({_head_of(name) for name in [*missing, *misshapen]}))
    raise UserError(f"{field}.weights: {_misfit(weights, arch, own, tensors, (missing, unknown, misshapen))}")


def _read_weights(weights: str, model: nn.Module, *, arch: str, section: str) -> dict[str, Tensor]:
    path, field = Path(weights), f"{section}.weights"
    if path.is_dir():
        load_card(path)
        return _read_safetensors(path / "model.safetensors", field)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, field)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise UserError(
            f"{field}: {weights} is a pickle, which can run code when it is read; convert it with "
            "safetensors.torch.save_file(state_dict, 'weights.safetensors')"
        )
    if "/" in weights:
        raise UserError(f"{field}: there is no run directory {weights!r}; train it first, or check the path")
    if arch in _AUXILIARY_HEADS and not getattr(model, "transform_input", True):
        raise UserError(
            f"{field}: {weights} of {arch} was trained with transform_input, so the model needs it too; "
            f"set {section}.arch_args: {{transform_input: true}}"
        )
    with torch.random.fork_rng(devices=[]):
        return _library_weights(weights, arch, field)


_AUXILIARY_HEADS = {"torchvision/googlenet": ("aux1.", "aux2."), "torchvision/inception_v3": ("AuxLogits.",)}
"""Beside the classifier, for torchvision's own way of training them; no model here has any."""


def _read_safetensors(path: Path, field: str) -> dict[str, Tensor]:
    try:
        tensors = read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"{field}: no file {path}; check the path, or train the run again") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{field}: {path} is damaged or no safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{field}: {name} of {path} holds numbers that are not finite; take other weights")
    return tensors


def _library_weights(name: str, arch: str, field: str) -> dict[str, Tensor]:
    library, _, model_name = arch.partition("/")
    try:
        if library == "torchvision":
            from torchvision import models

            known_weights = models.get_model_weights(model_name)[name]
            return models.get_model(model_name, weights=known_weights, progress=False).state_dict()  # renames old keys
        if library == "timm":
            import timm

            tagged = model_name if name == "pretrained" else f"{model_name}.{name}"
            return timm.create_model(tagged, pretrained=True).state_dict()
    except KeyError:
        known = ", ".join(models.get_model_weights(model_name).__members__)
        raise UserError(f"{field}: {arch} has no weights {name!r} (there are: {known})") from None
    except Exception as error:  # every client raises its own kind when there is no network or no such name
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{field}: cannot download {name!r} of {arch} ({said}); without a network give a "
            ".safetensors file, or null to start from random weights"
        ) from None
    raise UserError(f"{field}: {name!r} is no run directory and no .safetensors file, and {library} knows no weights by name")


def _classifier_and_stem(own: Mapping[str, Tensor]) -> set[str]:
    """Keys of the first and of the last module that has a weight of two or more dimensions."""
    ends = _ends(own)
    return {name for name in own if _head_of(name) in ends}


def _ends(own: Mapping[str, Tensor]) -> list[str]:
    """Names of these two modules: stem, classifier."""
    weights = [name for name, tensor in own.items() if tensor.dim() >= 2]
    return [_head_of(weights[0]), _head_of(weights[-1])] if weights else []


def _heads(names: set[str]) -> set[str]:
    return {_head_of(name) for name in names}


def _head_of(name: str) -> str:
    return name.rpartition(".")[0]


def _copied(model: nn.Module, tensors: dict[str, Tensor], replaced: list[str]) -> list[str]:
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in own and _head_of(name) not in replaced:
                own[name].copy_(tensor)
    return [f"{name}: starts from random weights, because the weights given have another shape there" for name in replaced]


def _misfit(
    weights: str,
    arch: str,
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    differences: tuple[list[str], list[str], list[str]],
) -> str:
    missing, unknown, misshapen = differences
    if misshapen and not missing and not unknown and {_head_of(name) for name in misshapen} == set(_ends(own)[1:]):
        name = misshapen[0]
        return f"{weights} has {tensors[name].shape[0]} classes ({name}), but {own[name].shape[0]} are wanted"
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", misshapen))
        if names
    ]
    return (
        f"{weights} does not fit {arch}: of its tensors {'; '.join(parts)}. Set arch and stem to what it was made with"
        f"{_made_with(Path(weights))}"
    )


def _made_with(path: Path) -> str:
    """Where a model card tells."""
    directory = path if path.is_dir() else path.parent
    if not path.exists() or not (directory / "model.json").is_file():
        return ""
    card = load_card(directory)
    return f": {card.arch}, stem {card.stem}"
