"""Lookup in the schema: the type behind a dotted name, its description in words, and the nearest known name."""

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
"""Stands for any key of a mapping of sections."""

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}
_CLOSE = 0.9


def options(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section in `X`, `X | None` or `float | X`."""
    return next((option for option in options(annotation) if isinstance(option, type) and issubclass(option, BaseModel)), None)


def is_number(annotation: Any) -> bool:
    """Return whether a number is a value of this type, as it is for `float | Schedule`."""
    return float in options(annotation)


def entry_of(annotation: Any) -> Any:
    """Return X of a mapping `dict[str, X]` (perhaps one of several alternatives), or None."""
    return next((typing.get_args(option)[1] for option in options(annotation) if typing.get_origin(option) is dict), None)


def child(annotation: Any, key: str) -> Any:
    """Return the type of the setting `key` below `annotation`, or None where there is no such setting."""
    section = section_of(annotation)
    if section is not None:
        return section.model_fields[key].annotation if key in section.model_fields else None
    return entry_of(annotation)


def leaves(annotation: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield name and type of every setting that is not a section. Schedules, written as numbers too, count as settings."""
    section = section_of(annotation)
    if section is None or is_number(annotation):
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


def match(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most similar, if one is."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return '; did you mean X?' or the empty string."""
    found = match(name, known)
    return f"; did you mean {found}?" if found else ""


def meant(config_class: type[BaseModel], keys: Keys, value: Any) -> Keys | None:
    """Return the setting that an unknown name most likely stands for: a sibling, the same key elsewhere, or a similar name."""
    parent: Any = config_class
    for key in keys[:-1]:
        parent = child(parent, key)
    section = section_of(parent)
    fields = section.model_fields if section else {}
    takes_value = {key: is_number(field.annotation) or not section_of(field.annotation) for key, field in fields.items()}
    siblings = [key for key in fields if takes_value[key] or isinstance(value, dict)]
    if sibling := match(keys[-1], siblings):
        return (*keys[:-1], sibling)
    known = [leaf for leaf, _ in leaves(config_class) if NAME not in leaf]
    same_key = [leaf for leaf in known if leaf[-1] == keys[-1]]
    if len(same_key) == 1:
        return same_key[0]
    similar = difflib.get_close_matches(".".join(keys), [".".join(leaf) for leaf in known], n=1, cutoff=_CLOSE)
    return tuple(similar[0].split(".")) if similar else None


def type_of(config_class: type[BaseModel], keys: Keys) -> Any:
    """Return the type of a setting, or of the one that an unknown name stands for; None where there is neither."""
    annotation: Any = config_class
    for end, key in enumerate(keys, start=1):
        above, annotation = annotation, child(annotation, key)
        if annotation is None and section_of(above):
            guess = meant(config_class, keys[:end], {} if keys[end:] else None)
            return type_of(config_class, guess + keys[end:]) if guess else None
    return annotation


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
