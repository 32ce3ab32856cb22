"""Exceptions of the package, and the exit codes to which they lead."""

from __future__ import annotations


class UserError(ValueError):
    """Mistake of the user; the program exits with 2. The message is one paragraph with field, value, rule and remedy."""


class Preempted(Exception):  # noqa: N818  (not an error)
    """Stop by a signal, in a state from which the work can be resumed; the program exits with 128 + number.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class PeerLost(Exception):  # noqa: N818  (a fault of the machine, not of the program)
    """Loss of another process of the launch; the program exits with 1, without a traceback."""


class OutputClosed(BrokenPipeError):  # noqa: N818  (not an error)
    """Write to a stdout without a reader, such as `| head` leaves; the program exits with 128 + SIGPIPE, without a message."""


def describe_error(error: BaseException, *, limit: int = 300) -> str:
    """Return the type and message of a library's exception in one line, as part of a UserError's message."""
    message = " ".join(str(error).split())[:limit]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
