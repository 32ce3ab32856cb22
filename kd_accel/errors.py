"""Exceptions of the package, and the exit codes to which they lead."""

from __future__ import annotations


class UserError(ValueError):
    """Mistake of the user; the program exits with 2. The message is one paragraph with field, value, rule and remedy."""


class IneffectiveSetting(UserError):  # noqa: N818  (as UserError, a mistake in the input)
    """Setting of the data that has no effect with the source that was found.

    Args:
        setting: Dotted name.
        reason: Rest of the message, after the name.
    """

    def __init__(self, setting: str, reason: str) -> None:
        super().__init__(setting, reason)
        self.setting = setting

    def __str__(self) -> str:
        """Return the message in one paragraph."""
        return f"{self.setting}: {self.args[1]}"


class UnreadableImage(UserError):  # noqa: N818  (as UserError, a mistake in the input)
    """Image that cannot be read or decoded. A training stops after a checkpoint; the program exits with 2.

    Args:
        description: Sample, split, file and reason, the part of the message before the remedy.
        remedy: What the user can do.
        sample: Index of the sample in its source split.
        setting: Setting of the source.
    """

    def __init__(self, description: str, remedy: str, sample: int, setting: str = "data.source") -> None:
        super().__init__(description, remedy, sample, setting)
        self.sample = sample

    def __str__(self) -> str:
        """Return the message in one paragraph."""
        return f"{self.args[3]}: {self.args[0]}; {self.args[1]}"

    def with_remedy(self, remedy: str) -> UnreadableImage:
        """Return the same error with another remedy."""
        return UnreadableImage(self.args[0], remedy, *self.args[2:])


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
