"""Settings of YAML files and flags, merged into one nested mapping with the origin of each setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from kd_accel.config.fields import Keys, child, entry_of, exists, is_text, options
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from kd_accel.config.suggestions import main_setting, suggestions, type_of
from kd_accel.io.safe_yaml import MAX_DEPTH, load_yaml, load_yaml_file, place

COMMAND_LINE, CALL = "the command line", "the call"


@dataclass
class Settings:
    """Merged settings, and the mistakes in their form.

    Attributes:
        config_class: Schema of the settings.
        values: Nested mapping.
        origins: Origin of each setting: its file, COMMAND_LINE or CALL.
        typed: Texts of the command line or of the call; user code among them is allowed.
        mistakes: Messages.
    """

    config_class: type[BaseModel]
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)
    typed: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    def add_file(self, path: str) -> None:
        """Merge the settings of a YAML file."""
        content = read_yaml(path, self.mistakes, config_class=self.config_class)
        if _is_of_another_command(self.config_class, content):
            keys = ", ".join(map(str, content))
            self.mistakes.append(
                f"config: {path} is a file of another command; none of its settings ({keys}) is one of this command"
            )
        else:
            where = f"./{path}" if path in (COMMAND_LINE, CALL) else path
            self._merge(self.values, content, self.config_class, (), where)

    def add(self, settings: Mapping[Any, Any], where: str) -> None:
        """Merge nested settings of the command line or of a call from Python."""
        plain = _plain(settings)
        self.typed += [text for _, text in texts(plain)]
        self._merge(self.values, plain, self.config_class, (), where)

    def add_flags(self, flags: Sequence[tuple[str, str | None]]) -> None:
        """Merge settings given as (dotted name, text); the text of a flag without a value is None."""
        for name, text in flags:
            keys = tuple(name.split("."))[:MAX_DEPTH]
            annotation = type_of(self.config_class, keys)
            if text is None and exists(self.config_class, keys):
                self.mistakes.append(f"--{name}: a value is missing; write {_example(name, annotation)}")
                continue
            self.add(nested(keys, None if text is None else _value(annotation, text)), COMMAND_LINE)

    def origin(self, keys: Keys) -> str | None:
        """Return where a setting was set last; None for a default."""
        return next((self.origins[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self.origins), None)

    def _merge(self, into: dict[str, Any], added: Mapping[Any, Any], annotation: Any, above: Keys, where: str) -> None:
        for key, value in ((str(key), value) for key, value in added.items()):
            keys = (*above, key)
            if isinstance(value, dict):
                below = into[key] if isinstance(into.get(key), dict) else {}
                self._merge(below, value, child(annotation, key), keys, where)
                if below or not value:  # a mapping that only removed entries does not begin a section
                    into[key], self.origins[keys] = below, where
            elif value is not None or entry_of(annotation) is None:
                into[key], self.origins[keys] = value, where
            elif into.pop(key, None) is None and where not in (COMMAND_LINE, CALL):
                rule = f"null removes an entry, but no earlier file has it; for the defaults write {key}: {{}}"
                self.mistakes.append(f"{'.'.join(keys)}: {rule} (in {where})")


def read_yaml(
    path: str, mistakes: list[str], *, field: str = "config", config_class: type[BaseModel] | None = None
) -> dict[Any, Any]:
    """Read the settings in a file.

    Args:
        path: Path of the file.
        mistakes: List to which a message is added if the file cannot be read or holds no settings.
        field: Beginning of the message.
        config_class: Schema of the settings, by which the name of a setting in place of a path is recognized.

    Returns:
        The settings; empty after a mistake.
    """
    try:
        content = load_yaml_file(Path(path))
    except FileNotFoundError:
        mistakes.append(f"{field}: file {path!r} not found; {_remedy_of_missing(path, config_class)}")
        return {}
    except OSError as error:
        mistakes.append(f"{field}: cannot read {path} ({error.strerror}); name a YAML file")
        return {}
    except (yaml.YAMLError, ValueError) as error:
        mistakes.append(f"{field}: {path} is not valid YAML ({place(error)}); fix the file")
        return {}
    if isinstance(content, dict):
        return content
    found = "nothing" if content is None else f"a {type(content).__name__}"
    mistakes.append(f"{field}: {path} holds {found}; it must hold settings as `key: value`")
    return {}


def nested(keys: Keys, value: Any) -> dict[str, Any]:
    """Return a value under its keys: {"a": {"b": value}}."""
    for key in reversed(keys[1:]):
        value = {key: value}
    return {keys[0]: value}


def texts(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Yield each text in nested values, keys included, with the setting in which it is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield keys, str(key)
            yield from texts(inner, (*keys, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item, keys)
    elif isinstance(value, str):
        yield keys, value


def _is_of_another_command(config_class: type[BaseModel], content: Mapping[Any, Any]) -> bool:
    """Return whether a file has no setting of this command, few that could be misspelled, and some of another command."""
    if len(content) < 3 or config_class.model_fields.keys() & content.keys():
        return False
    others = (RunConfig, BenchConfig, ReproduceConfig)
    misspelled = sum(bool(suggestions(config_class, (str(key),), value)) for key, value in content.items())
    overlap = max(len(other.model_fields.keys() & content.keys()) for other in others)
    return 2 * misspelled < len(content) or 2 * overlap > len(content)


def _remedy_of_missing(path: str, config_class: type[BaseModel] | None) -> str:
    name, has_value, _ = path.partition("=")
    if config_class is not None and (has_value or exists(config_class, tuple(name.split(".")))):
        return f"a setting is given as --{path}{'' if has_value else ' VALUE'}"
    return "paths are relative to the working directory"


def _example(name: str, annotation: Any) -> str:
    if inner := main_setting(annotation):
        return f"--{name}.{inner} VALUE"
    return f"--{name} {'true or false' if bool in options(annotation) else 'VALUE'}"


def _plain(value: Any) -> Any:
    """Return nested values with dicts, lists and texts in place of Python's other mappings, tuples and paths."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _value(annotation: Any, text: str) -> Any:
    """Return the value of a flag: its text if the setting takes text only, else YAML, in which None is null as in Python."""
    if text in ("null", "None"):
        return None
    if annotation is not None and is_text(annotation):
        return text
    try:
        value = load_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if value is None else _without_python_none(value)


def _without_python_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_python_none(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_python_none(item) for item in value]
    return None if value == "None" else value
