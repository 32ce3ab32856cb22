"""Lookup in the schema: the type of a setting by its dotted name, its values in words, and the nearest known name."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from kd_accel.config.schema import Argument

Keys = tuple[str, ...]
"""The parts of a setting's dotted name."""
NAME = "NAME"
"""Placeholder for the free keys of a mapping of sections."""

_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


def options(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section in `X`, `X | None` or `float | X`."""
    return next((option for option in options(annotation) if isinstance(option, type) and issubclass(option, BaseModel)), None)


def takes_scalar(annotation: Any) -> bool:
    """Return whether a number or a name is a value of this type, as for `float | Schedule` and `Preset | TransformConfig`."""
    return any(option is float or typing.get_origin(option) is Literal for option in options(annotation))


def entry_of(annotation: Any) -> Any:
    """Return X of a mapping `dict[str, X]`, which may be one of several alternatives, or None."""
    return next((typing.get_args(option)[1] for option in options(annotation) if typing.get_origin(option) is dict), None)


def child(annotation: Any, key: str) -> Any:
    """Return the type of the setting `key` below `annotation`, or None if it does not exist."""
    section = section_of(annotation)
    if section is not None:
        return section.model_fields[key].annotation if key in section.model_fields else None
    return entry_of(annotation)


def exists(annotation: Any, keys: Keys) -> bool:
    """Return whether a setting or section of this name exists below `annotation`."""
    for key in keys:
        annotation = child(annotation, key)
    return annotation is not None


def leaves(annotation: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield name and type of every setting that is not a section. A section that may be written as a scalar is a setting."""
    section = section_of(annotation)
    if section is None or takes_scalar(annotation):
        inner = entry_of(annotation)
        yield from leaves(inner, (*keys, NAME)) if section_of(inner) else ((keys, annotation),)
        return
    for key, field in section.model_fields.items():
        yield from leaves(field.annotation, (*keys, key))


def words(annotation: Any) -> str:
    """Describe the values of a type, for messages."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list (of each item: {words(arguments[0])})"
    if origin is dict or section_of(annotation) is annotation:
        return "settings as `key: value`"
    if annotation == Argument:
        return "a number, text, true, false, or a list of these"
    return _WORDS[annotation] if annotation in _WORDS else " or ".join(map(words, options(annotation)))


def takes_text(annotation: Any) -> bool:
    """Return whether any text is a value of this type, or an item of one."""
    return any(option in (str, list[str], dict[str, str]) for option in options(annotation))


def is_text(annotation: Any) -> bool:
    """Return whether the values of this type are texts, any or one of a few, and perhaps null."""
    return all(option in (str, types.NoneType) or typing.get_origin(option) is Literal for option in options(annotation))


def match(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most similar, or None if none is similar enough."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return '; did you mean X?' or the empty string."""
    found = match(name, known)
    return f"; did you mean {found}?" if found else ""


def as_one_teacher(name: str) -> str:
    """Return the dotted name of a setting of one of several teachers as that of a single one; other names are unchanged.

    `teachers.a.run` becomes `teacher.run`.
    """
    section, _, below = name.partition(".")
    return f"teacher.{below.partition('.')[2]}" if section == "teachers" and below else name


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
