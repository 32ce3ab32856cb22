"""Code of the user's own, named on the command line or in a config as `import:package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from kd_accel.types import UserError

PREFIX = "import:"


def resolve_import(spec: str, *, field: str) -> Callable[..., Any]:
    """The function that `import:package.module:function` names. Raises UserError that says which part is missing."""
    module_name, _, function_name = spec.removeprefix(PREFIX).partition(":")
    if not module_name or module_name.startswith(".") or not function_name:
        raise UserError(f"{field}: {spec!r} must have the form import:package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{field}: cannot import {module_name!r} ({error}); it is looked for in the working directory too"
        ) from None
    except SyntaxError as error:
        raise UserError(f"{field}: {module_name!r} is not valid Python ({error}); mend the file") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{field}: {module_name} has no function {function_name!r}")
    return function
