"""User code, named as `import:package.module:function`: permission to run it, import and call.

A config, a run directory or a chain may come from an untrusted source, and a name in one of them would run code. So a name is
allowed only if it was typed on the command line, or if the user allowed all names with `--allow_import`, or with
KD_ACCEL_ALLOW_IMPORT=1 where the command line cannot be changed. Allowed names are stored in that variable, so that commands
started from this one (`reproduce`) inherit them. The rule applies to files; names passed from Python are not checked.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_accel.errors import UserError, describe_error

PREFIX = "import:"
ALLOW_FLAG = "--allow_import"
VARIABLE = "KD_ACCEL_ALLOW_IMPORT"
_ALL = "1"


def take_allowance(argv: Sequence[str]) -> list[str]:
    """Remove `--allow_import` from a command line, and allow all names of user code if it was present.

    It is a flag rather than a setting, so that no config file can set it.
    """
    if ALLOW_FLAG in argv:
        os.environ[VARIABLE] = _ALL
    return [token for token in argv if token != ALLOW_FLAG]


def allow(typed: Sequence[str]) -> None:
    """Allow the names of user code among `typed`, arguments of the command line, for this process and its child processes."""
    names = [text for text in typed if text.startswith(PREFIX)]
    if names:
        os.environ[VARIABLE] = " ".join(sorted({*os.environ.get(VARIABLE, "").split(), *names}))


def import_problem(name: str, *, field: str, where: str) -> str | None:
    """Return the error message if `name`, found in the file `where`, is user code that is not allowed; else None."""
    if not name.startswith(PREFIX) or not {_ALL, name}.isdisjoint(os.environ.get(VARIABLE, "").split()):
        return None
    return (
        f"{field}: {where} names {name!r}, code that was not typed on this command line and would be run; if you trust it, add "
        f"{ALLOW_FLAG} to the command line, or set the environment variable {VARIABLE}=1 (in Python by os.environ)"
    )


def resolve_import(spec: str, *, field: str) -> Callable[..., Any]:
    """Import the function of the name `import:package.module:function`.

    Args:
        spec: The name.
        field: Setting that contains the name, for error messages.

    Raises:
        UserError: If the name is malformed, the module cannot be imported, or the function is not found in it.
    """
    module_name, _, function_name = spec.removeprefix(PREFIX).partition(":")
    if not module_name or module_name.startswith(".") or not function_name:
        raise UserError(f"{field}: {spec!r} must have the form import:package.module:function")
    # `python -m kd_accel` searches the working directory, the `kd-accel` script does not.
    if not {"", os.getcwd()} & set(sys.path):  # noqa: PTH109
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{field}: cannot import {module_name!r} ({error}); check the name (the working directory is also searched)"
        ) from None
    except SyntaxError as error:
        raise UserError(f"{field}: {module_name!r} is not valid Python ({error}); fix the file") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}: importing {module_name!r} fails with {_describe_with_line(error)}; fix the file") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{field}: {module_name} has no function {function_name!r}; check the name")
    return function


def call_import(
    spec: str,
    arguments: Sequence[Any],
    named: Mapping[str, Any],
    *,
    field: str,
    called_with: str,
    arguments_field: str | None = None,
) -> Any:
    """Import the function of the name `import:package.module:function`, call it and return its result.

    Args:
        spec: The name.
        arguments: Positional arguments.
        named: Keyword arguments.
        field: Setting that contains the name, for error messages.
        called_with: Description of the arguments, for error messages.
        arguments_field: Setting that determines the arguments, for error messages; None = `field`.

    Raises:
        UserError: If the function cannot be imported, does not accept the arguments, or raises an exception. The message then
            contains the line that failed.
    """
    function = resolve_import(spec, field=field)
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise UserError(
            f"{arguments_field or field}: {spec} does not accept its arguments ({error}); it is called with {called_with}"
        ) from None
    except ValueError:
        # Some built-in functions have no signature.
        pass
    try:
        return function(*arguments, **named)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}: {spec} fails with {_describe_with_line(error)}; fix the function") from error


def _describe_with_line(error: BaseException) -> str:
    """Return the type, the message and the innermost line of code of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{describe_error(error)}{where}"
