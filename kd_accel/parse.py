"""From a command line to a checked config: YAML files in order, then flags, then every mistake in one answer.

jsonargparse does the parsing, the types, `--help` and `--print_config`. It stops at the first mistake and offers no nearest
name, so when it refuses, each setting is tried again by itself and all that fail are reported together.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kd_accel.checks import problems
from kd_accel.config import RunConfig
from kd_accel.types import UserError

Config = TypeVar("Config")


def build_parser(config_class: type, *, prog: str, description: str) -> ArgumentParser:
    """A parser whose flags are the fields of `config_class`; commands add their own arguments to it."""
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; later files and then flags win")
    parser.add_class_arguments(config_class, as_group=False, fail_untyped=False)
    return parser


def parse_config(config_class: type[Config], argv: Sequence[str], *, parser: ArgumentParser) -> tuple[Config, dict[str, Any]]:
    """The config that `argv` describes, and the values of the arguments that the command added itself.

    Raises UserError that lists every mistake: unknown keys with the nearest name, wrong types, broken rules.
    """
    try:
        namespace = parser.parse_args(list(argv))
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(_all_mistakes(config_class, argv, parser, error)) from None
    values = dict(vars(parser.instantiate(namespace)))
    own = {field.name for field in fields(config_class)}  # type: ignore[arg-type]
    config = config_class(**{key: value for key, value in values.items() if key in own})
    found = problems(config)
    if found:
        raise UserError(_listed(found))
    return config, {key: value for key, value in values.items() if key not in own}


def load_config_file(config_class: type[Config], path: Path) -> Config:
    """The config saved in a run directory."""
    parser = build_parser(config_class, prog="kd-accel", description="")
    return parse_config(config_class, ["--config", str(path)], parser=parser)[0]


def save_config(config: Any, path: Path) -> None:
    """The complete config, as YAML that `--config` reads."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}: settings by the names that a person types."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """', did you mean X?' or the empty string."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {prefix}{matches[0]}?" if matches else ""


def _all_mistakes(config_class: type, argv: Sequence[str], parser: ArgumentParser, first_error: Exception) -> str:
    mistakes: list[str] = []
    accepted: dict[str, Any] = {}
    for where, settings in _written_settings(argv, parser, mistakes):
        for key, value in _leaves(config_class, settings, where, mistakes):
            reason = _refusal(parser, key, value)
            if reason:
                mistakes.append(f"{key}: {reason} (in {where})")
            else:
                accepted[key] = value
    if config_class is RunConfig and mistakes:
        mistakes += _broken_rules(parser, accepted)
    return _listed(mistakes) if mistakes else _one_line(first_error)


def _written_settings(argv: Sequence[str], parser: ArgumentParser, mistakes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, nested settings) for each config file and each flag."""
    own_flags = {option for action in parser._actions for option in action.option_strings if "." not in option}
    tokens = iter(argv)
    for token in tokens:
        flag, has_value, value = token.partition("=")
        if not flag.startswith("--"):
            continue
        value = value if has_value else next(tokens, "")
        if flag == "--config":
            yield value, _read_yaml(value, mistakes)
        elif flag not in own_flags or flag[2:] in _field_types(RunConfig):
            yield "the command line", _nested(flag[2:], yaml.safe_load(value) if value else None)


def _read_yaml(path: str, mistakes: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        mistakes.append(f"config: cannot read {path} ({getattr(error, 'strerror', None) or error})")
        return {}
    except yaml.YAMLError as error:
        mistakes.append(f"config: {path} is not YAML: {_one_line(error)}")
        return {}
    if isinstance(content, dict):
        return content
    mistakes.append(f"config: {path} must hold settings as `key: value`, not {type(content).__name__}")
    return {}


def _leaves(
    config_class: type, settings: dict[str, Any], where: str, mistakes: list[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting whose key exists; a key that does not is noted with the nearest name."""
    known = _field_types(config_class)
    for key, value in settings.items():
        if key not in known:
            mistakes.append(f"{prefix}{key}: no such setting{nearest(str(key), list(known), prefix=prefix)} (in {where})")
        elif (section := _section_type(known[key])) and isinstance(value, dict):
            yield from _leaves(section, value, where, mistakes, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _field_types(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def _section_type(annotation: Any) -> type | None:
    """The dataclass in `X`, `X | None` or `float | X`."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((option for option in options if is_dataclass(option)), None)  # type: ignore[return-value]


def _refusal(parser: ArgumentParser, key: str, value: Any) -> str | None:
    """Why this one setting is refused by itself, or None. Fields that a section must have are no concern here."""
    try:
        parser.parse_object(_nested(key, value))
    except (ArgumentError, TypeError, ValueError) as error:
        reason = re.sub(r"^Parser key \S+ |<class '(\w+)'>", r"\1", _one_line(error))
        return None if "is required" in reason else reason
    return None


def _broken_rules(parser: ArgumentParser, accepted: dict[str, Any]) -> list[str]:
    settings: dict[str, Any] = {}
    for key, value in accepted.items():
        _merge(settings, _nested(key, value))
    try:
        return problems(RunConfig(**_instance_values(parser, settings)))
    except (ArgumentError, TypeError, ValueError):
        return []


def _instance_values(parser: ArgumentParser, settings: dict[str, Any]) -> dict[str, Any]:
    values = vars(parser.instantiate(parser.parse_object(settings)))
    return {field.name: values[field.name] for field in fields(RunConfig)}


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _listed(mistakes: list[str]) -> str:
    unique = list(dict.fromkeys(mistakes))
    return unique[0] if len(unique) == 1 else "\n".join([f"{len(unique)} mistakes:", *(f"  {item}" for item in unique)])
