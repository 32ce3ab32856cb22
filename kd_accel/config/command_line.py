"""Parser of command lines: a command's own arguments, its config files and its settings."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel

from kd_accel.config.fields import nearest
from kd_accel.config.help import settings_help
from kd_accel.config.suggestions import listed, suggestions
from kd_accel.errors import UserError
from kd_accel.io.user_code import ALLOW_FLAG

HELP_OF_ALLOW = (
    f"{ALLOW_FLAG}: Run user code (import:...) that a file or a run names; code named on the command line needs no flag."
)


class CommandParser(argparse.ArgumentParser):
    """Parser of a command's own arguments. With a config class it leaves the settings aside, and its help lists them.

    Args:
        command: Name of the command.
        arguments: The command's own arguments, as the usage shows them.
        description: Description of the command, for its help.
        config_class: Schema of the settings that the command takes.
        takes_files: Whether positional arguments are config files, each equal to `--config FILE` in its place.
        is_taken: Function that returns whether a setting, by its dotted name, can be set by a flag; the command then takes no
            config files. None = files and all settings.
        losses: Names of the registered losses by kind, "logits" and "features"; without them names are not checked.
    """

    def __init__(
        self,
        command: str,
        arguments: str,
        description: str,
        *,
        config_class: type[BaseModel] | None = None,
        takes_files: bool = False,
        is_taken: Callable[[str], bool] | None = None,
        losses: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        has_config = config_class is not None and is_taken is None
        settings = " [FILE ...]" if takes_files else " [--config FILE ...]" if has_config else ""
        flags = " [--a.b VALUE ...]" if config_class else ""
        super().__init__(
            prog=f"kd-accel {command}",
            usage=f"%(prog)s {arguments}{settings}{flags}".replace("  ", " ").strip(),
            description=description,
            epilog=HELP_OF_ALLOW,
            allow_abbrev=False,
            add_help=False,
        )
        self.config_class, self.takes_files, self.is_taken, self.losses = config_class, takes_files, is_taken, losses or {}
        self.add_argument("-h", "--help", action="help", help="Show this help and exit.")
        if takes_files:  # for the help alone: `split` turns them into --config, which keeps their order among its files
            self.add_argument("files", nargs="*", metavar="FILE", help="YAML file of settings; later files override.")
        if has_config:
            same = "The same as FILE." if takes_files else "YAML file of settings; later files override."
            self.add_argument("--config", action="append", default=[], metavar="FILE", help=same)
            self.add_argument("--print_config", action="store_true", help="Print the complete config as YAML and exit.")

    def format_help(self) -> str:
        """Return usage, the command's own arguments and, for a command with a config, all settings."""
        settings = settings_help(self.config_class, self.losses, self.is_taken) if self.config_class else ""
        return f"{super().format_help()}{settings}"

    def print_help(self, file: Any = None) -> None:
        """Print the help. argparse's own method ignores a closed stdout."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raise UserError in place of argparse's exit."""
        message = message.replace("the following arguments are required:", "missing:").removeprefix("argument ")
        raise UserError(f"{message} ({' '.join(self.format_usage().split())})")

    def options(self) -> list[str]:
        """Return the names of all options."""
        return list(self._option_string_actions)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the command's own arguments. Raises UserError."""
        values, surplus = self.parse_known_args(list(argv))
        if surplus:
            self._refuse(surplus[0].partition("=")[0])
        return values

    def _refuse(self, name: str) -> NoReturn:
        if name.startswith("-"):
            self.error(f"{name}: no such option{self._remedy(name)}")
        if self.config_class and all(action.option_strings for action in self._actions):
            self.error(f"{name}: is not a flag; a config file is given as --config FILE, a setting as --a.b VALUE")
        self.error(f"{name}: unexpected argument")

    def _remedy(self, name: str) -> str:
        if self.config_class is None:
            return nearest(name, self.options())
        found = suggestions(self.config_class, tuple(name.lstrip("-").split(".")), None)
        return listed(found, "--") or "; a config file is given as --config FILE, a setting as --a.b VALUE"

    def split(self, argv: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
        """Separate the settings from the command's own arguments.

        Returns:
            (settings as pairs of dotted name and text, where the text of a flag without a value is None; own arguments).
        """
        settings: list[tuple[str, str | None]] = []
        own: list[str] = []
        tokens = deque(argv)
        while tokens:
            token = tokens.popleft()
            name, has_value, text = token.partition("=")
            action = self._option_string_actions.get(name)
            has_next = bool(tokens) and not tokens[0].startswith("--") and not has_value
            if action is not None:
                own.append(token)
                own += [tokens.popleft()] if has_next and action.nargs != 0 else []
            elif not token.startswith("--"):
                own.append(f"--config={token}" if self.takes_files and not token.startswith("-") else token)
            else:
                settings.append((name[2:], tokens.popleft() if has_next else text if has_value else None))
        return settings, own
