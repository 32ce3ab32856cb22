"""Registry of losses: lookup by name, validation of settings, and the table of all registered losses.

A loss is a class in a file of this package, or a user's class given as `import:package.module:Class`; its settings are a nested
pydantic model. Registered names are read from the source text, so that a config can be checked before torch is imported.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
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
_CLASS = re.compile(r'^(?:@register\("([^"]+)"\)\n)?class (\w+)\((\w+)', re.MULTILINE)
"""Class with a base, and the name under which it is registered. Parsing the files as Python would take ten times as long."""
_BASES: dict[str, Kind] = {"LogitLoss": "logits", "FeatureLoss": "features"}


@dataclass(frozen=True)
class LossDescription:
    """Description of a loss, from the docstring and the attributes of its class.

    Attributes:
        kind: Kind of the compared tensors, logits or features.
        name: Registered name; empty for a user's class.
        summary: First line of the docstring.
        formula: Section "Formula:" of the docstring; empty if missing.
        paper: Section "References:" of the docstring; empty if missing.
        per_sample: Whether the loss is a mean over samples.
        supports_mixed_labels: Whether the loss is defined for samples mixed by mixup or cutmix.
        settings: Tuple (name, default, description) of each setting; the default is None if the setting is required.
    """

    kind: Kind
    name: str
    summary: str
    formula: str
    paper: str
    per_sample: bool
    supports_mixed_labels: bool
    settings: tuple[tuple[str, str | None, str], ...]


@cache
def _registered() -> dict[tuple[str, str], tuple[str, str]]:
    """Find every `@register("name")` in the source of this package, as {(kind, name): (module, class)}."""
    classes = [
        (path.stem, *match.groups())
        for path in sorted(Path(__file__).parent.glob("*.py"))
        for match in _CLASS.finditer(path.read_text(encoding="utf-8"))
    ]
    base_of = {class_name: base for _, _, class_name, base in classes}
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for module, name, class_name, base in classes:
        if name is not None:
            while base not in _BASES:
                base = base_of[base]
            key = (_BASES[base], name)
            assert key not in found, f"two losses are registered as {key}"
            found[key] = (f"{__package__}.{module}", class_name)
    return found


def names(kind: Kind) -> list[str]:
    """Return the sorted names of the registered losses of a kind, without importing torch."""
    return sorted(name for own, name in _registered() if own == kind)


def load_loss(kind: Kind, name: str, *, field: str = "loss") -> Any:
    """Import the class of a loss.

    Args:
        kind: Kind of the loss, logits or features.
        name: Registered name, or `import:package.module:Class`.
        field: Setting that holds the name, for messages.

    Raises:
        UserError: If the name is not registered, or the imported object is not a loss of this kind.
    """
    if name.startswith(PREFIX):
        found: Any = resolve_import(name, field=field)
    elif (kind, name) in _registered():
        module, class_name = _registered()[kind, name]
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
    """Return the kind of a loss class; None for any other object."""
    from kd_accel.losses import base

    if not isinstance(loss, type):
        return None
    return next((kind for name, kind in _BASES.items() if issubclass(loss, getattr(base, name))), None)


def build_loss(kind: Kind, name: str, args: Mapping[str, Any], *, field: str) -> LogitLoss | FeatureLoss:
    """Build a loss from its name and settings.

    Args:
        kind: Kind of the loss, logits or features.
        name: Registered name, or `import:package.module:Class`.
        args: Settings of the loss.
        field: Section of the config that holds the name and settings, for messages.

    Raises:
        UserError: If the name is not a loss of this kind, or settings are unknown or not valid.
    """
    loss = load_loss(kind, name, field=f"{field}.loss")
    built: LogitLoss | FeatureLoss = loss(**loss.checked_settings(args, field=f"{field}.args"))
    return built


def find_losses(name: str) -> list[LossDescription]:
    """Describe all losses with a name, at most one of each kind. Imports torch.

    Args:
        name: Registered name, or `import:package.module:Class`.

    Raises:
        UserError: If the name is not registered, or the imported object is not a loss.
    """
    if name.startswith(PREFIX):
        found: Any = resolve_import(name, field="losses")
        if _kind_of(found) is None:
            raise UserError(f"losses: {name} must be a class derived from kd_accel.losses.LogitLoss or FeatureLoss")
        return [_describe(found)]
    kinds = [kind for kind in _BASES.values() if name in names(kind)]
    if not kinds:
        known = sorted({*names("logits"), *names("features")})
        raise UserError(f"losses: {name!r} is not the name of a loss{nearest(name, known)} (known: {', '.join(known)})")
    return [_describe(load_loss(kind, name)) for kind in kinds]


def losses_table() -> str:
    """Format the registered losses as a Markdown table, which docs/losses.md contains. Imports torch."""
    found = [_describe(load_loss(kind, name)) for kind in _BASES.values() for name in names(kind)]
    header = ["loss", "compares", "formula", "settings", "per sample", "mixed labels", "paper"]
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
        "yes" if loss.supports_mixed_labels else "no",
        loss.paper,
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def _describe(loss: Any) -> LossDescription:
    kind = _kind_of(loss)
    assert kind is not None, f"{loss} is not a loss"
    docstring, texts = inspect.cleandoc(loss.__doc__ or ""), descriptions(loss.Settings)
    settings = tuple(
        (name, None if field.is_required() else _yaml_value(field.get_default(call_default_factory=True)), texts.get(name, ""))
        for name, field in loss.Settings.model_fields.items()
    )
    formula, paper = _section(docstring, "Formula"), _section(docstring, "References")
    batch = (loss.per_sample, loss.supports_mixed_labels)
    return LossDescription(kind, loss.name, docstring.partition("\n")[0], formula, paper, *batch, settings)


def _yaml_value(default: Any) -> str:
    """Format a default value as in YAML."""
    return default if isinstance(default, str) else json.dumps(default)


def _section(docstring: str, title: str) -> str:
    """Return the text of a section of a Google-style docstring, joined to one line."""
    _, _, below = docstring.partition(f"{title}:\n")
    lines = []
    for line in below.splitlines():
        if not line.startswith(" "):
            break
        lines.append(line.strip())
    return " ".join(lines)
