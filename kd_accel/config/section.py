"""Base of all groups of settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A group of settings: frozen, strictly typed (`true` is not a number, `1.5` is not an integer), without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
