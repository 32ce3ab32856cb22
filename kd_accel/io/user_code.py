"""Code of the user's own, named as `import:package.module:function`: whose word is enough to run it, and how it is called.

A config, a run directory or a chain may come from a stranger, and a name in one of them would run code. So a name counts only
if it was typed on the command line, or if the user allowed all of them: with `--allow_import`, or with KD_ACCEL_ALLOW_IMPORT=1
where a command line is out of reach. What is allowed stands in that variable, so that it reaches the commands started from
this one (`reproduce`). The rule holds for files; a caller from Python has written the name himself.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_accel.errors import UserError

PREFIX = "import:"
ALLOW_FLAG = "--allow_import"
VARIABLE = "KD_ACCEL_ALLOW_IMPORT"
_ALL = "1"


def take_allowance(argv: Sequence[str]) -> list[str]:
    """The command line without `--allow_import`, which is no setting: no file can give it."""
    if ALLOW_FLAG in argv:
        os.environ[VARIABLE] = _ALL
    return [token for token in argv if token != ALLOW_FLAG]


def allow(typed: Sequence[str]) -> None:
    """From here on, in this process and in those that it starts. typed: texts of the command line, own code among them."""
    own = [text for text in typed if text.startswith(PREFIX)]
    if own:
        os.environ[VARIABLE] = " ".join(sorted({*os.environ.get(VARIABLE, "").split(), *own}))


def import_problem(name: str, *, field: str, where: str) -> str | None:
    """Why code that `where` names may not run, or None: it is no own code, or it is allowed."""
    if not name.startswith(PREFIX) or not {_ALL, name}.isdisjoint(os.environ.get(VARIABLE, "").split()):
        return None
    return (
        f"{field}: {where} names {name!r}, which would run code that nobody named here; if you trust it, say so: add "
        f"{ALLOW_FLAG} to the command line (or set {VARIABLE}=1)"
    )


def resolve_import(spec: str, *, field: str) -> Callable[..., Any]:
    """The function that `import:package.module:function` names. Raises UserError that says which part is missing."""
    module_name, _, function_name = spec.removeprefix(PREFIX).partition(":")
    if not module_name or module_name.startswith(".") or not function_name:
        raise UserError(f"{field}: {spec!r} must have the form import:package.module:function")
    if not {"", os.getcwd()} & set(sys.path):  # noqa: PTH109  (as `python -m kd_accel` has it, and the `kd-accel` script has not)
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{field}: cannot import {module_name!r} ({error}); it is looked for in the working directory too"
        ) from None
    except SyntaxError as error:
        raise UserError(f"{field}: {module_name!r} is not valid Python ({error}); mend the file") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}: importing {module_name!r} fails with {_fault(error)}; mend the file") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{field}: {module_name} has no function {function_name!r}")
    return function


def call_import(
    spec: str, arguments: Sequence[Any], named: Mapping[str, Any], *, field: str, called_with: str, blame: str | None = None
) -> Any:
    """What that function gives for these arguments. called_with: what they are, for people. blame: the field that decides
    them, where it is not `field`.

    Raises UserError where it does not take them, and, with the place in the user's file, where it fails.
    """
    function = resolve_import(spec, field=field)
    try:
        inspect.signature(function).bind(*arguments, **named)
    except TypeError as error:
        raise UserError(
            f"{blame or field}: {spec} does not take its arguments ({error}); it is called with {called_with}"
        ) from None
    except ValueError:  # some built-in functions do not tell their signature
        pass
    try:
        return function(*arguments, **named)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}: {spec} fails with {_fault(error)}; mend it") from error


def _fault(error: BaseException) -> str:
    """Kind, message, and the innermost line of code."""
    said = " ".join(str(error).split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{f': {said}' if said else ''}{where}"
