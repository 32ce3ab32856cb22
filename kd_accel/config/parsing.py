"""From files and flags to a validated config, with all mistakes in one message.

pydantic validates the merged settings. A misspelled setting then counts as its nearest name and a wrong value as absent, so
that validation and the rules of validation.py go on with the rest, and one slip is reported once.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kd_accel.config.command_line import CommandParser
from kd_accel.config.fields import Keys, child, flatten, match, meant, options, takes_text, words
from kd_accel.config.schema import ReproduceConfig, RunConfig
from kd_accel.config.settings import CALL, COMMAND_LINE, Settings, nested, texts
from kd_accel.config.validation import problems
from kd_accel.errors import UserError
from kd_accel.io.safe_yaml import dump_yaml
from kd_accel.io.user_code import allow, import_problem

Config = TypeVar("Config", bound=BaseModel)
_LISTED = 20
_SHOWN = 200


def parse_config(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    parser: CommandParser | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Parse and check a command line; with `--print_config` print the config and exit.

    Args:
        config_class: schema of the settings.
        argv: flags, among them `--config FILE`; files are merged in their order, then the other flags.
        parser: parser of the command's own arguments; names of losses are checked if it has some.

    Returns:
        The config, and the values of the command's own arguments.

    Raises:
        UserError: Lists every mistake: unknown settings with the nearest name, wrong types, broken rules.
    """
    parser = parser or CommandParser("train", "", "", config_class=config_class)
    settings, arguments = _read(config_class, argv, parser)
    config = _checked(settings, parser.losses, parser.options())
    if arguments.print_config:
        print(dump_yaml(config.model_dump(mode="json")), end="")
        raise SystemExit(0)
    return config, arguments


def build_config(
    config_class: type[Config],
    source: Path | str | Mapping[str, Any] | Config,
    overrides: Mapping[str, Any],
    *,
    losses: Mapping[str, Sequence[str]],
) -> Config:
    """Build and check a config from Python.

    Args:
        config_class: schema of the settings.
        source: YAML file, nested settings or a config.
        overrides: values by dotted name, merged like flags; a value is taken as it is, not as text.
        losses: names of the registered losses by kind; empty = names are not checked.

    Raises:
        UserError: Lists every mistake.
    """
    settings = Settings(config_class)
    if isinstance(source, Path | str):
        settings.add_file(str(source))
    else:
        settings.add(source.model_dump() if isinstance(source, BaseModel) else source, CALL)
    for name, value in overrides.items():
        settings.add(nested(tuple(name.split(".")), value), CALL)
    config: Config = _checked(settings, losses)
    return config


def load_config_file(config_class: type[Config], path: Path) -> Config:
    """Load the config of a run directory. Raises UserError."""
    return parse_config(config_class, [f"--config={path}"])[0]


def save_config(config: BaseModel, path: Path) -> None:
    """Write the complete config as YAML that `--config` reads."""
    path.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")


def flag_mistakes(config_class: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """Return the mistakes in flags by themselves, before the files to which they are added are known."""
    parser = CommandParser("train", "", "", config_class=config_class)
    try:
        settings, _ = _read(config_class, argv, parser)
    except UserError as error:
        return [str(error)]
    _validate(settings, parser.options(), is_partial=True)
    return settings.mistakes


def _read(config_class: type[BaseModel], argv: Sequence[str], parser: CommandParser) -> tuple[Settings, argparse.Namespace]:
    flags, own = parser.split(argv)
    arguments, settings = parser.parse(own), Settings(config_class)
    for path in arguments.config:
        settings.add_file(path)
    settings.add_flags(flags)
    return settings, arguments


def _checked(settings: Settings, losses: Mapping[str, Sequence[str]], command_options: Sequence[str] = ()) -> Any:
    """Return the config of merged settings. Raises UserError that lists every mistake."""
    given, is_partial = copy.deepcopy(settings.values), bool(settings.mistakes)
    config, refused = _validate(settings, command_options, is_partial=is_partial)
    broken = problems(config, losses) if config is not None else []
    found = [
        *settings.mistakes,
        *(f"{rule}{_where(settings, rule.partition(':')[0])}" for rule in broken if not _names(rule, refused)),
        *_foreign_code(settings, given),
    ]
    if found:
        raise UserError(_listed(found))
    return config


def _validate(settings: Settings, command_options: Sequence[str], *, is_partial: bool) -> tuple[Any, set[str]]:
    """Validate the settings and add to their mistakes.

    Args:
        settings: merged settings; wrong ones are taken out of `values`.
        command_options: options of the command, which a misspelled flag may mean.
        is_partial: a file is missing, so that settings without a default may be missing too.

    Returns:
        The config, or None where it cannot be built, and the names of the settings that were refused.
    """
    refused: set[str] = set()
    while True:
        try:
            return settings.config_class.model_validate(settings.values), refused
        except ValidationError as error:
            found = {_keys(settings.config_class, each["loc"], each["type"]): each["type"] for each in error.errors()}
        missing = [".".join(keys) for keys, kind in found.items() if kind == "missing" and ".".join(keys) not in refused]
        wrong = {keys: kind for keys, kind in found.items() if kind != "missing" and not _has_deeper(keys, found)}
        if not wrong:
            if missing and not is_partial:
                message = f"{', '.join(missing)}: missing, and without a default; set it in a file (--config FILE) or as a flag"
                settings.mistakes.append(message)
            return None, refused
        for keys, kind in wrong.items():
            name = ".".join(keys)
            value, annotation = _pop(settings, keys)
            if kind == "extra_forbidden":
                guess = meant(settings.config_class, keys, value)
                message = _unknown(settings, keys, value, guess, command_options)
                _count_as(settings, guess, value)
            else:
                message = f"{name}: {_refusal(annotation, value)}"
                refused.add(name)
            settings.mistakes.append(f"{message}{_where(settings, name)}")


def _keys(config_class: type[BaseModel], location: tuple[int | str, ...], kind: str) -> Keys:
    """Return the setting of an error. pydantic's location also has the branches of unions, and ends with items of lists."""
    annotation: Any = config_class
    keys: Keys = ()
    is_union = False
    for part in location:
        if is_union:  # this part is the name of a branch
            is_union = False
            continue
        annotation = None if isinstance(part, int) else child(annotation, part)
        if annotation is None:
            break
        keys, is_union = (*keys, str(part)), len([option for option in options(annotation) if option is not type(None)]) > 1
    return (*keys, str(location[-1])) if kind == "extra_forbidden" else keys


def _has_deeper(keys: Keys, found: Mapping[Keys, str]) -> bool:
    """Return whether an error within this setting is known; then the setting as a whole is only the wrong branch of a union."""
    return any(len(other) > len(keys) and other[: len(keys)] == keys for other in found)


def _pop(settings: Settings, keys: Keys) -> tuple[Any, Any]:
    """Take a setting out and return its value and type."""
    parent: Any = settings.values
    annotation: Any = settings.config_class
    for key in keys[:-1]:
        parent, annotation = parent[key], child(annotation, key)
    return parent.pop(keys[-1]), child(annotation, keys[-1])


def _count_as(settings: Settings, keys: Keys | None, value: Any) -> None:
    """Set a misspelled setting under the name that is meant, except where that is set already."""
    parent: Any = settings.values
    for key in (keys or ())[:-1]:
        parent = parent.setdefault(key, {}) if isinstance(parent, dict) else None
    if keys is None or value is None or not isinstance(parent, dict):
        return
    present = parent.setdefault(keys[-1], value)
    if isinstance(present, dict) and isinstance(value, dict):
        parent[keys[-1]] = {**value, **present}


def _unknown(settings: Settings, keys: Keys, value: Any, guess: Keys | None, command_options: Sequence[str]) -> str:
    name, is_typed = ".".join(keys), settings.origin(keys) == COMMAND_LINE
    if settings.config_class is ReproduceConfig and keys[0] in RunConfig.model_fields:
        if not is_typed:
            return f"{name}: is a setting of a training, not of the chain; move it into the files that runs lists"
        flags = " ".join(f"--{key}={given}" for key, given in flatten({name: value}).items())
        return f"{name}: is a setting of the trainings, not of the chain; write it after --, as in: -- {flags}"
    if is_typed and len(keys) == 1 and (option := match(name, [known.lstrip("-") for known in command_options])):
        return f"--{name}: no such option; did you mean --{option}?"
    return f"{name}: no such setting" + (f"; did you mean {'.'.join(guess)}?" if guess else "")


def _refusal(annotation: Any, value: Any) -> str:
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    items = value if isinstance(value, list) else [value]
    is_misread = takes_text(annotation) and any(not isinstance(item, str | list | dict | None) for item in items)
    return f"must be {words(annotation)}, not {shown}{'; put it in quotes' if is_misread else ''}"


def _names(rule: str, refused: set[str]) -> bool:
    """Return whether a broken rule may be due to a setting that was refused."""
    head = rule.partition(":")[0]
    return any(name.startswith(f"{head}.") or re.search(rf"(?<![\w.]){re.escape(name)}\b", rule) for name in refused)


def _where(settings: Settings, name: str) -> str:
    origin = settings.origin(tuple(name.split(".")))
    return f" (in {origin})" if origin else ""


def _foreign_code(settings: Settings, given: Mapping[str, Any]) -> list[str]:
    """Return a message for each name of user code that is in a file and that the user neither typed nor allowed."""
    allow(settings.typed)
    named = ((".".join(keys), settings.origin(keys) or COMMAND_LINE, text) for keys, text in texts(given))
    found = (import_problem(text, field=name, where=where) for name, where, text in named)
    return [problem for problem in found if problem]


def _listed(mistakes: Sequence[str]) -> str:
    unique = list(dict.fromkeys(mistakes))
    more = [f"  and {len(unique) - _LISTED} more"] if len(unique) > _LISTED else []
    listed = [f"  {item}" for item in unique[:_LISTED]]
    return unique[0] if len(unique) == 1 else "\n".join([f"{len(unique)} mistakes:", *listed, *more])
