"""Config parser: merges files and flags, validates the settings, and reports all mistakes in one message.

pydantic validates the merged settings. A misspelled setting is then validated under its nearest name and a wrong value is
dropped, so that the remaining settings and the rules of validation.py are still checked, and each mistake is reported once.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kd_accel.config.command_line import CommandParser
from kd_accel.config.fields import Keys, child, flatten, options, takes_text, words
from kd_accel.config.schema import ReproduceConfig, RunConfig
from kd_accel.config.settings import CALL, COMMAND_LINE, Settings, nested, texts
from kd_accel.config.suggestions import Form, Suggestion, listed, main_setting, meant, suggestions
from kd_accel.config.validation import problems
from kd_accel.errors import UserError
from kd_accel.io.safe_yaml import dump_yaml
from kd_accel.io.user_code import allow, import_problem

Config = TypeVar("Config", bound=BaseModel)
_MAX_LISTED = 20
_MAX_VALUE_CHARACTERS = 200
_CLOSE_OPTION = 0.75


def parse_config(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    parser: CommandParser | None = None,
) -> tuple[Config, argparse.Namespace]:
    """Parse and check a command line; with `--print_config` print the config and exit.

    Args:
        config_class: Schema of the settings.
        argv: Config files and flags. Files are merged in their order, then the flags.
        parser: Parser of the command's own arguments; the names of losses are checked if it has a list of them.

    Returns:
        The config, and the values of the command's own arguments.

    Raises:
        UserError: If a setting is not valid. The message lists every mistake: unknown settings with the settings that may be
            meant, wrong types and broken rules.
    """
    parser = parser or CommandParser("train", "", "", config_class=config_class)
    settings, arguments = _read(config_class, argv, parser)
    config = checked_config(settings, parser.losses, parser.options())
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
        config_class: Schema of the settings.
        source: YAML file, nested settings or a config.
        overrides: Values by dotted name, merged like flags; a text is not parsed.
        losses: Names of the registered losses by kind; empty = names are not checked.

    Returns:
        The config.

    Raises:
        UserError: If a setting is not valid. The message lists every mistake.
    """
    settings = Settings(config_class)
    if isinstance(source, Path | str):
        settings.add_file(str(source))
    else:
        # Without the defaults, because the default name depends on settings that may be overridden.
        settings.add(source.model_dump(exclude_unset=True) if isinstance(source, BaseModel) else source, CALL)
    for name, value in overrides.items():
        settings.add(nested(tuple(name.split(".")), value), CALL)
    config: Config = checked_config(settings, losses)
    return config


def load_config_file(config_class: type[Config], path: Path) -> Config:
    """Load the config of a run directory. Raises UserError."""
    return parse_config(config_class, [f"--config={path}"])[0]


def save_config(config: BaseModel, path: Path) -> None:
    """Write the complete config as a YAML config file."""
    path.write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")


def flag_mistakes(config_class: type[BaseModel], argv: Sequence[str]) -> list[str]:
    """Return the mistakes in flags alone, without the config files to which they will be added."""
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


def checked_config(settings: Settings, losses: Mapping[str, Sequence[str]], command_options: Sequence[str] = ()) -> Any:
    """Return the config of merged settings. Raises UserError that lists every mistake."""
    config, found = check_settings(settings, losses, command_options)
    if found:
        raise UserError(listed_mistakes(found))
    return config


def check_settings(
    settings: Settings, losses: Mapping[str, Sequence[str]], command_options: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """Return the config of merged settings, None if it cannot be built, and a message for each mistake."""
    given, is_partial = copy.deepcopy(settings.values), bool(settings.mistakes)
    config, refused = _validate(settings, command_options, is_partial=is_partial)
    broken = problems(config, losses) if config is not None else []
    found = [
        *settings.mistakes,
        *(f"{rule}{_where(settings, rule.partition(':')[0])}" for rule in broken if not _mentions(rule, refused)),
        *_foreign_code(settings, given),
    ]
    return config, found


def _validate(settings: Settings, command_options: Sequence[str], *, is_partial: bool) -> tuple[Any, set[str]]:
    """Validate the settings and add to their mistakes.

    Args:
        settings: Merged settings; wrong ones are taken out of `values`.
        command_options: Options of the command, which a misspelled flag may mean.
        is_partial: Whether settings without a default may be missing, because a file could not be read.

    Returns:
        The config, or None if it cannot be built, and the names of the refused settings.
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
                message = f"{', '.join(missing)}: missing, and without a default; set it in a config file or as a flag"
                settings.mistakes.append(message)
            return None, refused
        for keys, kind in wrong.items():
            value, annotation = _pop(settings, keys)
            if kind == "extra_forbidden":
                _refuse_unknown(settings, keys, value, command_options)
            else:
                name = ".".join(keys)
                settings.mistakes.append(f"{name}: {_refusal(settings, keys, annotation, value)}{_where(settings, name)}")
                refused.add(name)


def _keys(config_class: type[BaseModel], location: tuple[int | str, ...], kind: str) -> Keys:
    """Return the setting of an error from pydantic's location, which also has branches of unions and items of lists."""
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
    """Return whether another error is within this setting; the error of the setting itself is then a branch of its union."""
    return any(len(other) > len(keys) and other[: len(keys)] == keys for other in found)


def _pop(settings: Settings, keys: Keys) -> tuple[Any, Any]:
    """Take a setting out and return its value and type."""
    parent: Any = settings.values
    annotation: Any = settings.config_class
    for key in keys[:-1]:
        parent, annotation = parent[key], child(annotation, key)
    return parent.pop(keys[-1]), child(annotation, keys[-1])


def _refuse_unknown(settings: Settings, keys: Keys, value: Any, command_options: Sequence[str]) -> None:
    """Add a mistake for an unknown setting, and validate its value under the name that is meant."""
    typed = _typed_leaves(settings, keys, value)
    for name, inner in typed or [(keys, value)]:
        settings.mistakes.append(_unknown(settings, name, inner, command_options))
        _set_as(settings, meant(settings.config_class, name, inner), inner, origin=settings.origin(name))


def _typed_leaves(settings: Settings, keys: Keys, value: Any) -> list[tuple[Keys, Any]]:
    """Return the flags that an unknown section was typed as, such as `--trian.epochs`; none if a file has part of it."""
    leaves = [((*keys, *name.split(".")), inner) for name, inner in flatten(value).items()] if isinstance(value, dict) else []
    return leaves if all(settings.origin(name) == COMMAND_LINE for name, _ in leaves) else []


def _set_as(settings: Settings, keys: Keys | None, value: Any, *, origin: str | None) -> None:
    """Set a misspelled setting under the name that is meant, unless that is set already."""
    parent: Any = settings.values
    for key in (keys or ())[:-1]:
        parent = parent.setdefault(key, {}) if isinstance(parent, dict) else None
    if keys is None or value is None or not isinstance(parent, dict):
        return
    present = parent.setdefault(keys[-1], value)
    if isinstance(present, dict) and isinstance(value, dict):
        parent[keys[-1]] = {**value, **present}
    if origin:
        settings.origins.setdefault(keys, origin)


def _unknown(settings: Settings, keys: Keys, value: Any, command_options: Sequence[str]) -> str:
    name, origin = ".".join(keys), settings.origin(keys)
    found = suggestions(settings.config_class, keys, value)
    is_typed = origin == COMMAND_LINE
    if settings.config_class is ReproduceConfig and (message := _of_a_training(keys, value, origin, found)):
        return message if is_typed else f"{message} (in {origin})"
    if is_typed and (close := difflib.get_close_matches(f"--{name}", command_options, n=1, cutoff=_CLOSE_OPTION)):
        return f"--{name}: no such option; did you mean {close[0]}?"
    remedy = _did_you_mean(found, keys, origin)
    return f"--{name}: no such setting{remedy}" if is_typed else f"{name}: no such setting{remedy} (in {origin})"


def _of_a_training(keys: Keys, value: Any, origin: str | None, found: Sequence[Suggestion]) -> str:
    """Return the message for a setting of the trainings that was given to a chain; empty for another."""
    if keys[0] in RunConfig.model_fields:
        found_there = [Suggestion(keys)]
    else:
        found_there = [] if found else suggestions(RunConfig, keys, value)
    if not found_there:
        return ""
    name = ".".join(keys)
    if origin != COMMAND_LINE:
        return f"{name}: is a setting of a training, not of the chain; move it into the files that `runs` lists"
    flag = f"--{'.'.join(found_there[0].keys)}={found_there[0].value or value}"
    return f"--{name}: is a setting of the trainings, not of the chain; write it after --, as in: -- {flag}"


def _did_you_mean(found: Sequence[Suggestion], keys: Keys, origin: str | None) -> str:
    """Return the suggestions in the form that can be typed where the setting was."""
    if origin == COMMAND_LINE:
        return listed(found, "--") or "; --help lists all settings"
    is_elsewhere = any(each.keys[:-1] != keys[:-1] or each.value for each in found)
    is_nested = is_elsewhere if origin != CALL else ".".join(keys) in [".".join(each.keys) for each in found]
    return listed(found, "yaml" if is_nested else "") or ("" if origin == CALL else "; --help lists all settings")


def _refusal(settings: Settings, keys: Keys, annotation: Any, value: Any) -> str:
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= _MAX_VALUE_CHARACTERS else f"{shown[:_MAX_VALUE_CHARACTERS]}..."
    items = value if isinstance(value, list) else [value]
    is_misread = takes_text(annotation) and any(not isinstance(item, str | list | dict | None) for item in items)
    remedy = "; put it in quotes" if is_misread else ""
    if isinstance(value, str) and (inner := main_setting(annotation)):
        form: Form = "--" if settings.origin(keys) == COMMAND_LINE else "yaml"
        remedy = listed([Suggestion((*keys, inner))], form)
    return f"must be {words(annotation)}, not {shown}{remedy}"


def _mentions(rule: str, refused: set[str]) -> bool:
    """Return whether the message of a broken rule names a setting that was refused."""
    head = rule.partition(":")[0]
    return any(name.startswith(f"{head}.") or re.search(rf"(?<![\w.]){re.escape(name)}\b", rule) for name in refused)


def _where(settings: Settings, name: str) -> str:
    origin = settings.origin(tuple(name.split(".")))
    return f" ({'on' if origin == COMMAND_LINE else 'in'} {origin})" if origin else ""


def _foreign_code(settings: Settings, given: Mapping[str, Any]) -> list[str]:
    """Return a message for each name of user code that a file contains and that the user neither typed nor allowed."""
    allow(settings.typed)
    named = ((".".join(keys), settings.origin(keys) or COMMAND_LINE, text) for keys, text in texts(given))
    found = (import_problem(text, field=name, where=where) for name, where, text in named)
    return [problem for problem in found if problem]


def listed_mistakes(mistakes: Sequence[str]) -> str:
    """Return the message of a UserError for several mistakes, each once and at most 20 of them."""
    unique = list(dict.fromkeys(mistakes))
    more = [f"  and {len(unique) - _MAX_LISTED} more"] if len(unique) > _MAX_LISTED else []
    listed = [f"  {item}" for item in unique[:_MAX_LISTED]]
    return unique[0] if len(unique) == 1 else "\n".join([f"{len(unique)} mistakes:", *listed, *more])
