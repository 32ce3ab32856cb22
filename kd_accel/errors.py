"""Exceptions of the package and the exit codes they lead to."""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake: one paragraph that says field, value, rule and remedy. The program exits with 2."""


class Preempted(Exception):  # noqa: N818  (it is no error)
    """A signal has ended the work at a place from which it can go on. The program exits with 128 + number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class PeerLost(Exception):  # noqa: N818  (the machine's fault, not the program's)
    """Another process of the launch does not answer any more. The program exits with 1 and no traceback."""
