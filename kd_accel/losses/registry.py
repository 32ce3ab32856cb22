"""Losses by name: their classes, their settings and the table of all of them.

A loss is a module in a file of this package (or `import:package.module:Class`), with its settings as a pydantic model inside
the class. Names are read from the source text, so that a config can be checked before torch is imported.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kd_accel.config.fields import nearest
from kd_accel.config.help import descriptions
from kd_accel.errors import UserError
from kd_accel.io.user_code import PREFIX, resolve_import

if TYPE_CHECKING:
    from kd_accel.losses.base import FeatureLoss, LogitLoss

Kind = Literal["logits", "features"]
_BASES: dict[str, Kind] = {"LogitLoss": "logits", "FeatureLoss": "features"}


@dataclass(frozen=True)
class LossDescription:
    """A loss as its class describes it.

    Args:
        kind: logits or features.
        name: registered name; empty for a class of the user.
        summary: first line of the docstring.
        formula: section "Formula:" of the docstring, empty without one.
        paper: section "References:" of the docstring, empty without one.
        per_sample: whether the loss is a mean of terms of one sample each.
        settings: (name, default, description) of each setting; the default is None for one that must be given.
    """

    kind: Kind
    name: str
    summary: str
    formula: str
    paper: str
    per_sample: bool
    settings: tuple[tuple[str, str | None, str], ...]


@cache
def _found() -> dict[tuple[str, str], tuple[str, str]]:
    """Read (kind, name) -> (module, class) of every `@register("name")` in this package."""
    classes = [
        (node, path.stem)
        for path in sorted(Path(__file__).parent.glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    by_name = {node.name: node for node, _ in classes}
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for node, module in classes:
        if name := _registered_name(node):
            key = (_kind(node, by_name), name)
            assert key not in found, f"two losses are registered as {key}"
            found[key] = (f"{__package__}.{module}", node.name)
    return found


def _kind(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> Kind:
    """Return the kind of a class that derives from a base class, directly or through another loss."""
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    for base in bases:
        if base in _BASES:
            return _BASES[base]
    return _kind(next(classes[base] for base in bases if base in classes), classes)


def _registered_name(node: ast.ClassDef) -> str | None:
    for decorator in node.decorator_list:
        if not (isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "register"):
            continue
        if isinstance(argument := decorator.args[0], ast.Constant):
            return str(argument.value)
    return None


def names(kind: Kind) -> list[str]:
    """Return the names of the losses of a kind. Imports no torch."""
    return sorted(name for own, name in _found() if own == kind)


def load_loss(kind: Kind, name: str, *, field: str = "loss") -> Any:
    """Import the class of a loss.

    Args:
        kind: logits or features.
        name: a name of `names`, or `import:package.module:Class`.
        field: the setting that holds the name, for messages.

    Raises:
        UserError: the name is not known, or what it imports is not a loss of this kind.
    """
    if name.startswith(PREFIX):
        found: Any = resolve_import(name, field=field)
    elif (kind, name) in _found():
        module, class_name = _found()[kind, name]
        found = getattr(importlib.import_module(module), class_name)
    else:
        known = ", ".join([*names(kind), f"{PREFIX}package.module:Class"])
        raise UserError(
            f"{field}: {name!r} is not the name of a loss between {kind}{nearest(name, names(kind))} (known: {known})"
        )
    if _kind_of(found) != kind:
        base_name = next(base for base, own in _BASES.items() if own == kind)
        raise UserError(f"{field}: {name} must be a class derived from kd_accel.losses.{base_name}")
    return found


def _kind_of(loss: Any) -> Kind | None:
    """Return the kind of an object that may be the class of a loss."""
    from kd_accel.losses import base

    if not isinstance(loss, type):
        return None
    return next((kind for name, kind in _BASES.items() if issubclass(loss, getattr(base, name))), None)


def build_loss(kind: Kind, name: str, args: Mapping[str, Any], *, field: str) -> LogitLoss | FeatureLoss:
    """Build a loss from its settings. Raises UserError that names each setting that is unknown or wrong."""
    loss = load_loss(kind, name, field=f"{field}.loss")
    built: LogitLoss | FeatureLoss = loss(**loss.checked_settings(args, field=f"{field}.args"))
    return built


def find_losses(name: str) -> list[LossDescription]:
    """Describe the losses of a name, one of each kind that has it. Imports torch.

    Args:
        name: a name of `names`, or `import:package.module:Class`.

    Raises:
        UserError: the name is not known, or what it imports is not a loss.
    """
    if name.startswith(PREFIX):
        found: Any = resolve_import(name, field="losses")
        if _kind_of(found) is None:
            raise UserError(f"losses: {name} must be a class derived from kd_accel.losses.LogitLoss or FeatureLoss")
        return [_describe(found)]
    kinds = [kind for kind in _BASES.values() if name in names(kind)]
    if not kinds:
        every = sorted({*names("logits"), *names("features")})
        raise UserError(f"losses: {name!r} is not the name of a loss{nearest(name, every)} (known: {', '.join(every)})")
    return [_describe(load_loss(kind, name)) for kind in kinds]


def losses_table() -> str:
    """Return a Markdown table of the registered losses. Imports torch."""
    found = [_describe(load_loss(kind, name)) for kind in _BASES.values() for name in names(kind)]
    header = ["loss", "between", "formula", "settings", "per sample", "paper"]
    rows = [header, ["---"] * len(header), *(_row(loss) for loss in found)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(loss: LossDescription) -> list[str]:
    settings = ", ".join(f"`{name}`" if default is None else f"`{name}: {default}`" for name, default, _ in loss.settings)
    cells = [
        f"`{loss.name}`",
        loss.kind,
        f"`{loss.formula}`",
        settings or "none",
        "yes" if loss.per_sample else "no",
        loss.paper,
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def _describe(loss: Any) -> LossDescription:
    kind = _kind_of(loss)
    assert kind is not None, f"{loss} is not a loss"
    docstring, explained = inspect.cleandoc(loss.__doc__ or ""), descriptions(loss.Settings)
    settings = tuple(
        (name, None if field.is_required() else _plain(field.get_default(call_default_factory=True)), explained.get(name, ""))
        for name, field in loss.Settings.model_fields.items()
    )
    formula, paper = _section(docstring, "Formula"), _section(docstring, "References")
    return LossDescription(kind, loss.name, docstring.partition("\n")[0], formula, paper, loss.per_sample, settings)


def _plain(default: Any) -> str:
    """Write a default as YAML has it."""
    return default if isinstance(default, str) else json.dumps(default)


def _section(docstring: str, title: str) -> str:
    """Return a section of a Google-style docstring on one line."""
    _, _, below = docstring.partition(f"{title}:\n")
    lines = []
    for line in below.splitlines():
        if not line.startswith(" "):
            break
        lines.append(line.strip())
    return " ".join(lines)
