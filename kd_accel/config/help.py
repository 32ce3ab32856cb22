"""Help text of the settings of a config class: type, default and description of each.

Descriptions come from the "Args:" of the classes in schema.py.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kd_accel.config.fields import NAME, entry_of, options, section_of, takes_scalar
from kd_accel.config.schema import Argument, Schedule
from kd_accel.config.transform_schema import TransformConfig
from kd_accel.io.safe_yaml import dump_yaml

_WIDTH = 120
_LABELS = {
    bool: "BOOL",
    int: "INT",
    float: "FLOAT",
    str: "TEXT",
    types.NoneType: "null",
    Schedule: "SCHEDULE",
    TransformConfig: "TRANSFORMS",
}
_RULES = (
    "settings: --a.b VALUE, or a: {b: VALUE} in a YAML file. Files are merged in their order, then the flags: a mapping is\n"
    "merged key by key, and null removes an entry of a mapping {NAME: ...} or {KEY: ...}."
)

_FLAGS = (
    "settings: --a.b VALUE changes a setting of the run, which replaces the default below; null leaves a section out, as in\n"
    "--teacher null."
)


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Return the description of each setting, from the "Args:" of the class and of those it extends."""
    found: dict[str, str] = {}
    for own in reversed(section.__mro__):
        _, _, arguments = inspect.cleandoc(vars(own).get("__doc__") or "").partition("Args:\n")
        entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", arguments, flags=re.MULTILINE)
        found |= {name: " ".join(text.split()) for name, text in entries}
    return found


def settings_help(
    config_class: type[BaseModel], losses: Mapping[str, Sequence[str]], is_taken: Callable[[str], bool] | None = None
) -> str:
    """Return all settings, section by section, and the losses by name.

    Args:
        config_class: Schema of the settings.
        losses: Names of the registered losses by kind.
        is_taken: Function that returns whether a command takes a setting, by its dotted name, as a flag; None = it takes all,
            and files.
    """
    if is_taken is not None:
        return "\n".join(["", _FLAGS, *_section_help(config_class, "", "", is_taken), ""])
    lines = list(_section_help(config_class, "", ""))
    if any("SCHEDULE" in line for line in lines):
        lines += _section_help(Schedule, "a.b.", "SCHEDULE: {start: FLOAT, ...} in place of a number, for any --a.b above")
    if any("TRANSFORMS" in line for line in lines):
        lines += _section_help(
            TransformConfig, "data.transform.", "TRANSFORMS: {random_crop: {padding: 4}, ...}, in their order"
        )
    named = [f"losses ({kind}): {', '.join(names)}, or import:package.module:Class" for kind, names in losses.items()]
    return "\n".join(["", _RULES, *lines, *(["", *named] if named else []), ""])


def _section_help(
    section: type[BaseModel], prefix: str, heading: str, is_taken: Callable[[str], bool] = lambda name: True
) -> Iterator[str]:
    """Yield the settings of a section, then its sections; nothing for a section without settings to list."""
    texts, inner, lines = descriptions(section), [], []
    for name, field in section.model_fields.items():
        below = section_of(field.annotation) or section_of(entry_of(field.annotation))
        if below is not None and not takes_scalar(field.annotation):
            is_mapping = entry_of(field.annotation) is not None
            default = "  (default null)" if field.default is None and field.default_factory is None else ""
            key = f"{prefix}{name}.{NAME}" if is_mapping else f"{prefix}{name}"
            inner.append((below, f"{key}.", f"{key}:{default} {texts[name]}"))
            continue
        line = f"--{prefix}{name} {_label(field.annotation)}  ({_default(field)}) {texts[name]}"
        if is_taken(f"{prefix}{name}"):
            lines.append(textwrap.fill(line, _WIDTH, initial_indent="  ", subsequent_indent=" " * 8, break_on_hyphens=False))
    if lines:
        yield from ["", *([heading] if heading else []), *lines]
    for below, key, text in inner:
        yield from _section_help(below, key, text, is_taken)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"default {dump_yaml([value], in_one_line=True).strip()[1:-1]}"


def _label(annotation: Any) -> str:
    if annotation == Argument:
        return "VALUE"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is list:
        return f"[{_label(arguments[0])}, ...]"
    if origin is dict:
        return f"{{KEY: {_label(arguments[1])}, ...}}"
    return _LABELS[annotation] if annotation in _LABELS else "|".join(map(_label, options(annotation)))
