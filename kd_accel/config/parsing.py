"""From a command line to a checked config: YAML files in order, then flags, then every mistake in one answer.

jsonargparse does the parsing, `--help` and `--print_config`. It stops at the first mistake, offers no nearest name and passes
over some (a section that is a number, a key that stands twice), so written.py reads first what was written.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from kd_accel.config.reading import Written, flatten, missing_fields, nearest, read_written
from kd_accel.config.validation import problems
from kd_accel.errors import UserError
from kd_accel.io.user_code import ALLOW_FLAG, allow, import_problem

__all__ = ["build_parser", "flatten", "load_config_file", "nearest", "parse_arguments", "parse_config", "save_config"]

Config = TypeVar("Config")
HELP_OF_ALLOW = f"{ALLOW_FLAG}: run own code (import:...) that a file or a run names; what is typed as a flag runs without it"
_OWN_CODE = ("data.source", "model.arch", "teacher.arch")
_LISTED = 20


def build_parser(config_class: type, *, prog: str, description: str, arguments: str = "") -> ArgumentParser:
    """A parser whose flags are the fields of `config_class`; commands add their own arguments to it.

    arguments: these, as the line of usage shows them.
    """
    usage = f"%(prog)s {arguments} [--config FILE ...] [--setting VALUE ...]".replace("  ", " ")
    parser = plain_parser(prog, usage, description)
    parser.add_argument("--config", action="config", help="YAML file; later files and then flags win")
    parser.add_class_arguments(config_class, as_group=False, fail_untyped=False)
    return parser


def plain_parser(prog: str, usage: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        epilog=HELP_OF_ALLOW,
        exit_on_error=False,
        allow_abbrev=False,
    )


def parse_config(config_class: type[Config], argv: Sequence[str], *, parser: ArgumentParser) -> tuple[Config, dict[str, Any]]:
    """The config that `argv` describes, and the values of the arguments that the command added itself.

    Raises UserError that lists every mistake: unknown keys with the nearest name, wrong types, broken rules.
    """
    written = Written() if {"-h", "--help"} & set(argv) else _refuse_mistakes(config_class, argv, parser)
    values = dict(vars(parse_arguments(parser, argv)))
    own = {field.name for field in fields(config_class)}  # type: ignore[arg-type]
    config = config_class(**{key: value for key, value in values.items() if key in own})
    found = problems(config) + _foreign_code(config, written)
    if found:
        raise UserError(_listed(found))
    return config, {key: value for key, value in values.items() if key not in own}


def parse_arguments(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """What `argv` says to a parser. Raises UserError that ends in the line of usage."""
    try:
        return parser.instantiate(parser.parse_args(list(argv)))
    except (ArgumentError, TypeError, ValueError, OSError, RecursionError) as error:
        usage = " ".join(parser.format_usage().split())
        raise UserError(f"{_explained(' '.join(str(error).split()), parser)} ({usage})") from None


def load_config_file(config_class: type[Config], path: Path) -> Config:
    """The config saved in a run directory."""
    parser = build_parser(config_class, prog="kd-accel", description="")
    return parse_config(config_class, ["--config", str(path)], parser=parser)[0]


def save_config(config: Any, path: Path) -> None:
    """The complete config, as YAML that `--config` reads."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")


def _foreign_code(config: object, written: Written) -> list[str]:
    """Own code that stands in a file and that the user neither typed nor allowed."""
    allow(written.typed)
    named = {name: functools.reduce(lambda part, key: getattr(part, key, None), name.split("."), config) for name in _OWN_CODE}
    found = (
        import_problem(spec, field=name, where=written.origins.get(name, "a file"))
        for name, spec in named.items()
        if isinstance(spec, str)
    )
    return [problem for problem in found if problem]


def _refuse_mistakes(config_class: type, argv: Sequence[str], parser: ArgumentParser) -> Written:
    written = read_written(config_class, argv, parser=parser)
    mistakes, settings = list(written.mistakes), written.meant()
    missing = [name for name in missing_fields(config_class, settings) if name not in written.refused]
    if missing and not mistakes and not any(token.startswith("--print_config") for token in argv):
        mistakes.append(f"{', '.join(missing)}: missing, and without a default; set it in a file (--config FILE) or as a flag")
    if mistakes:
        raise UserError(_listed(mistakes + _broken_rules(config_class, settings, parser)))
    return written


def _broken_rules(config_class: type, settings: dict[str, Any], parser: ArgumentParser) -> list[str]:
    """Of what is left when the mistakes are set aside; none where that is no config."""
    try:
        values = vars(parser.instantiate(parser.parse_object(settings)))
        return problems(config_class(**{field.name: values[field.name] for field in fields(config_class)}))
    except (ArgumentError, TypeError, ValueError, KeyError, RecursionError):
        return []


def _explained(said: str, parser: ArgumentParser) -> str:
    if required := re.search(r"arguments are required: (.+)", said):
        by_name = {action.dest: _shown(action) for action in parser._actions}
        return f"missing: {', '.join(by_name.get(name, name) for name in required[1].split(', '))}"
    if unrecognized := re.search(r"unrecognized arguments: (\S+)", said):
        token = unrecognized[1].partition("=")[0]
        options = [option for action in parser._actions for option in action.option_strings]
        return (
            f"{token}: no such option{nearest(token, options)}" if token.startswith("-") else f"{token}: one argument too many"
        )
    return said


def _shown(action: Any) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _listed(mistakes: list[str]) -> str:
    unique = list(dict.fromkeys(mistakes))
    more = [f"  and {len(unique) - _LISTED} more"] if len(unique) > _LISTED else []
    listed = [f"  {item}" for item in unique[:_LISTED]]
    return unique[0] if len(unique) == 1 else "\n".join([f"{len(unique)} mistakes:", *listed, *more])
