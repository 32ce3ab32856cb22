"""What a person wrote, before it is a config: the settings of each YAML file and flag, and what is wrong with each by itself.

In: a command line. Out: `Written`, with every mistake in words and the nested settings that are left. A misspelled setting is
judged on under its nearest name, so that one slip is told once and not also as a setting that is missing.
"""

from __future__ import annotations

import difflib
import functools
import operator
import types
import typing
from argparse import Action
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kd_accel.config.schema import ReproduceConfig, RunConfig
from kd_accel.io.safe_yaml import load_yaml, load_yaml_file, place

COMMAND_LINE = "the command line"
_SHOWN = 200
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", types.NoneType: "null"}


@dataclass
class Written:
    """settings: nested, each valid by itself. guessed: misspelled ones, under the name that was meant. refused: dotted names.
    origins: where each valid one stands last, by dotted name. typed: the texts on the command line itself.
    """

    mistakes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    guessed: dict[str, Any] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    origins: dict[str, str] = field(default_factory=dict)
    typed: list[str] = field(default_factory=list)

    def meant(self) -> dict[str, Any]:
        """All that is usable; what was guessed gives way to what was written."""
        merged: dict[str, Any] = {}
        _merge(merged, self.guessed)
        _merge(merged, self.settings)
        return merged


def read_written(config_class: type, argv: Sequence[str], *, parser: ArgumentParser) -> Written:
    """parser: of the command, whose own options and arguments are left alone."""
    written = Written()
    options = {option: action for action in parser._actions for option in action.option_strings}
    own = [option for option in options if option[2:] not in field_types(config_class) and "." not in option]
    for where, settings in _sources(config_class, argv, parser, options, written.mistakes):
        _judge(written, config_class, settings, where, own=own if where == COMMAND_LINE else ())
    return written


def missing_fields(config_class: type, settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of settings without a default that are in no section that was begun."""
    missing = []
    for name, annotation in field_types(config_class).items():
        section, value = section_type(annotation), settings.get(name)
        if name not in settings and _has_no_default(config_class, name):
            missing.append(f"{prefix}{name}")
        elif section and isinstance(value, dict):
            missing += missing_fields(section, value, f"{prefix}{name}.")
    return missing


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}: settings by the names that a person types."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """'; did you mean X?' or the empty string."""
    match = _match(name, known)
    return f"; did you mean {prefix}{match}?" if match else ""


def field_types(config_class: type) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def section_type(annotation: Any) -> type | None:
    """The dataclass in `X`, `X | None` or `float | X`."""
    return next((option for option in _options(annotation) if is_dataclass(option)), None)  # type: ignore[return-value]


def _match(name: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _has_no_default(config_class: type, name: str) -> bool:
    declared = next(entry for entry in fields(config_class) if entry.name == name)
    return declared.default is MISSING and declared.default_factory is MISSING


def _sources(
    config_class: type, argv: Sequence[str], parser: ArgumentParser, options: Mapping[str, Action], mistakes: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, nested settings) for each config file and each flag that is a setting."""
    takes_arguments = any(not action.option_strings for action in parser._actions)
    known, tokens = field_types(config_class), deque(argv)
    while tokens:
        flag, has_value, value = tokens.popleft().partition("=")
        action = options.get(flag)
        if not flag.startswith("-"):
            if not takes_arguments:
                mistakes.append(f"{flag}: stands alone; a config file is given as --config FILE, a setting as --a.b VALUE")
            continue
        is_switch = action is not None and action.nargs == 0
        if flag == "--print_config" or is_switch or flag.endswith("+"):  # takes no value of its own; an addition to a list
            continue
        if not has_value and tokens and not tokens[0].startswith("--"):
            value = tokens.popleft()
        elif not has_value and action is not None:
            mistakes.append(f"{flag}: has no value; write {flag} VALUE")
            continue
        if flag == "--config":
            yield _file(value), _for_this_command(read_yaml(value, mistakes), value, known, mistakes)
        elif action is None and not flag.startswith("--"):
            mistakes.append(f"{flag}: no such option; a setting is given as --a.b VALUE")
        elif action is None or flag[2:].partition(".")[0] in known:
            yield _flag_setting(known, flag[2:], value, mistakes)


def _for_this_command(settings: dict[str, Any], path: str, known: Mapping[str, Any], mistakes: list[str]) -> dict[str, Any]:
    """Nothing where the file is one of another command, which is one mistake and not one for each key."""
    if len(settings) < 3 or known.keys() & settings.keys():
        return settings
    mistakes.append(
        f"config: {path} is written for another command: no setting in it ({', '.join(map(str, settings))}) is of this"
    )
    return {}


def _flag_setting(known: Mapping[str, Any], key: str, value: str, mistakes: list[str]) -> tuple[str, dict[str, Any]]:
    if key in known and section_type(known[key]) and Path(value).is_file():  # the settings of one section in a file
        return _file(value), {key: read_yaml(value, mistakes)}
    try:
        loaded = load_yaml(value)
    except (yaml.YAMLError, ValueError):
        loaded = None
    setting: Any = loaded if isinstance(loaded, dict) or value == "null" else value
    for part in reversed(key.split(".")):
        setting = {part: setting}
    return COMMAND_LINE, setting


def _file(path: str) -> str:
    """Its name, which is never that of the command line."""
    return f"./{path}" if path == COMMAND_LINE else path


def read_yaml(path: str, mistakes: list[str], *, field: str = "config") -> dict[str, Any]:
    """The settings in a file; empty, with a mistake that begins with `field`, where there are none that can be read."""
    try:
        content = load_yaml_file(Path(path))
    except OSError as error:
        mistakes.append(f"{field}: cannot read {path} ({error.strerror}); name a YAML file")
        return {}
    except (yaml.YAMLError, ValueError) as error:
        mistakes.append(f"{field}: {path} is not YAML that can be read ({place(error)}); mend the file")
        return {}
    if isinstance(content, dict):
        return content
    found = "nothing" if content is None else f"a {type(content).__name__}"
    mistakes.append(f"{field}: {path} holds {found}; it must hold settings as `key: value`")
    return {}


def _judge(
    written: Written,
    config_class: type,
    settings: Mapping[Any, Any],
    where: str,
    *,
    prefix: str = "",
    own: Sequence[str] = (),
    is_guess: bool = False,
) -> None:
    known = field_types(config_class)
    for key, value in settings.items():
        meant: str | None = key if key in known else _match(str(key), list(known))
        if key not in known:
            option = None if prefix else _match(f"--{key}", own)
            said = _unknown(
                config_class, f"{prefix}{key}", value, where, meant=f"{prefix}{meant}" if meant else None, option=option
            )
            written.mistakes.append(f"{said} (in {where})")
            if option or meant in settings:
                continue
        if meant is None:
            continue
        name, is_guessed = f"{prefix}{meant}", is_guess or key not in known
        section = section_type(known[meant])
        if section and isinstance(value, dict):
            _merge(written.guessed if is_guessed else written.settings, _nested(name, {}))
            _judge(written, section, value, where, prefix=f"{name}.", is_guess=is_guessed)
        elif reason := _refusal(known[meant], value):
            written.mistakes.append(f"{name}: {reason} (in {where})")
            written.refused.add(name)
        else:
            _merge(written.guessed if is_guessed else written.settings, _nested(name, value))
            written.origins[name] = where
            if where == COMMAND_LINE and isinstance(value, str):
                written.typed.append(value)


def _unknown(config_class: type, name: str, value: Any, where: str, *, meant: str | None, option: str | None) -> str:
    first = name.partition(".")[0]
    if config_class is ReproduceConfig and first in field_types(RunConfig):
        if where != COMMAND_LINE:
            return f"{name}: is a setting of a training, not of the chain; it belongs into the files that runs lists"
        flags = " ".join(f"--{key}={given}" for key, given in flatten({name: value}).items())
        return f"{name}: is a setting of the trainings, not of the chain; write it after --, as in: -- {flags}"
    if option:
        return f"--{name}: no such option; did you mean {option}?"
    return f"{name}: no such setting" + (f"; did you mean {meant}?" if meant else "")


def _refusal(annotation: Any, value: Any) -> str | None:
    """Why a value does not fit its type, or None."""
    plain = [option for option in _options(annotation) if not is_dataclass(option)]
    if plain and (value is not None or types.NoneType in plain):  # the parser takes null for "not given", whatever the type
        try:
            _parser_of(functools.reduce(operator.or_, plain)).parse_object({"value": value})
            return None
        except (ArgumentError, TypeError, ValueError, RecursionError):
            pass
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    takes_text = any(option is str or typing.get_origin(option) is Literal for option in plain)
    is_misread = takes_text and not isinstance(value, str | list | dict | None)
    return f"must be {_words(annotation)}, not {shown}{'; put it in quotes' if is_misread else ''}"


@functools.cache
def _parser_of(annotation: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    return parser


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is list:
        return f"a list (of each item: {_words(arguments[0])})"
    if origin is dict or is_dataclass(annotation):
        return "settings as `key: value`"
    if annotation in _WORDS:
        return _WORDS[annotation]
    return " or ".join(_words(option) for option in _options(annotation))


def _options(annotation: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
