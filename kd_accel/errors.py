"""Exceptions of the package, and the exit codes to which they lead."""

from __future__ import annotations


class UserError(ValueError):
    """Mistake of the user. The message is one paragraph with field, value, rule and remedy; the program exits with 2."""


class Preempted(Exception):  # noqa: N818  (not an error)
    """Stop by a signal, at a place from which the work can resume. The program exits with 128 + number.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class PeerLost(Exception):  # noqa: N818  (a fault of the machine, not of the program)
    """Loss of another process of the launch. The program exits with 1, without a traceback."""


def describe_error(error: BaseException, *, limit: int = 300) -> str:
    """Return type and message of another library's exception in one line, for a message of ours."""
    message = " ".join(str(error).split())[:limit]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
