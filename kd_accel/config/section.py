"""Base of all groups of settings, and the type of a free argument."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

Argument = bool | int | float | str | list[bool | int | float | str | None]
"""Argument of a model builder or a loss; an entry of null is removed while the settings are merged (settings.py)."""


class Section(BaseModel):
    """A group of settings: frozen, strictly typed (`true` is not a number, `1.5` is not an integer), without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
