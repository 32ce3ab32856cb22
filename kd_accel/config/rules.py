"""Rules for settings of several sections. Each yields a message for each broken rule: field, value, rule and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

ARCHS = ("torchvision/", "timm/", "import:")

BEST_WEIGHTS = "model_best.safetensors"
"""File of the weights of the best epoch in a run directory."""

RUN_WEIGHTS = ("model.safetensors", BEST_WEIGHTS)
"""Files of weights in a run directory, which model.json describes."""


class WithoutEffect(str):
    """Message about a setting that is valid but has no effect. A sweep leaves such a setting out of a trial.

    Args:
        message: Field, rule and remedy.
        setting: Dotted name of the setting or section to leave out; None = the field at the beginning of the message.

    Attributes:
        setting: This name.
    """

    setting: str

    def __new__(cls, message: str, setting: str | None = None) -> Self:
        """Return the message with the name of its setting."""
        self = super().__new__(cls, message)
        self.setting = setting or message.partition(":")[0]
        return self


def arch_problems(name: str, arch: str) -> Iterator[str]:
    """Yield a message if an architecture has no known prefix. name: name of the setting."""
    if not arch.startswith(ARCHS):
        yield f"{name}: {arch!r} must start with one of {', '.join(ARCHS)}"


def pixel_statistics(section: str, mean: list[float] | None, std: list[float] | None) -> Iterator[str]:
    """Yield a message for each wrong mean or standard deviation of the channels."""
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (len(values) != 3 or not all(0 <= value <= 1 for value in values)):
            yield f"{section}.{name}: {values} must be three numbers in 0..1, one for each of red, green and blue"
    if std is not None and any(value == 0 for value in std):
        yield f"{section}.std: {std} must be above 0"


def at_least(section: object, name: str, least: int, *field_names: str) -> Iterator[str]:
    """Yield a message for each setting of a section that is set and below `least`."""
    for field_name in field_names:
        value = getattr(section, field_name)
        if value is not None and not value >= least:
            yield f"{name}.{field_name}: {value} must be at least {least}"


def no_effect(section: object, name: str, field_names: tuple[str, ...], *, because: str) -> Iterator[str]:
    """Yield a message for each setting that differs from its default and has no effect in this mode."""
    default = type(section)()
    for field_name in field_names:
        if getattr(section, field_name) != getattr(default, field_name):
            yield WithoutEffect(f"{name}.{field_name}: has no effect ({because}); leave it out")
