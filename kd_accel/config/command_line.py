"""Command lines: the options of a command, the settings among them, and errors in one line with the usage."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NoReturn

from pydantic import BaseModel

from kd_accel.config.fields import nearest
from kd_accel.config.help import settings_help
from kd_accel.errors import UserError
from kd_accel.io.user_code import ALLOW_FLAG

HELP_OF_ALLOW = f"{ALLOW_FLAG}: run user code (import:...) that a file or a run names; typed as a flag it runs without this."


class CommandParser(argparse.ArgumentParser):
    """Parser of a command's own arguments; with a config class it leaves the settings aside, and its help lists them.

    Args:
        command: name of the command.
        arguments: the arguments as the line of usage shows them.
        description: what the command does.
        config_class: schema of the settings that the command takes.
        losses: names of the registered losses by kind, "logits" and "features"; without them names are not checked.
    """

    def __init__(
        self,
        command: str,
        arguments: str,
        description: str,
        *,
        config_class: type[BaseModel] | None = None,
        losses: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        settings = " [--config FILE ...] [--a.b VALUE ...]" if config_class else ""
        super().__init__(
            prog=f"kd-accel {command}",
            usage=f"%(prog)s {arguments}{settings}".replace("  ", " ").strip(),
            description=description,
            epilog=HELP_OF_ALLOW,
            allow_abbrev=False,
        )
        self.config_class, self.losses = config_class, losses or {}
        if config_class:
            self.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later files override")
            self.add_argument("--print_config", action="store_true", help="print the complete config as YAML and exit")

    def format_help(self) -> str:
        """Return usage, own arguments and, where there are any, all settings."""
        settings = settings_help(self.config_class, self.losses) if self.config_class else ""
        return f"{super().format_help()}{settings}"

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
            remedy = "; a setting is given as --a.b VALUE" if self.config_class else nearest(name, self.options())
            self.error(f"{name}: no such option{remedy}")
        if self.config_class and all(action.option_strings for action in self._actions):
            self.error(f"{name}: stands alone; a config file is given as --config FILE, a setting as --a.b VALUE")
        self.error(f"{name}: one argument too many")

    def split(self, argv: Sequence[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
        """Return the settings, as (dotted name, text or None), and the command's own arguments."""
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
                own.append(token)
            else:
                settings.append((name[2:], tokens.popleft() if has_next else text if has_value else None))
        return settings, own
