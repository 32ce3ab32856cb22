"""Default name of a run: architecture, data set and role, in letters that are safe in a file name."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd_accel.config.schema import RunConfig

AUTO = "auto"
"""Value of `name` that stands for the default name."""

_LONGEST_PART = 40


def run_name(config: RunConfig) -> str:
    """Return the name of a run, or its default ARCH-DATA-ROLE, such as `resnet18-cifar10-distilled`."""
    if config.name != AUTO:
        return config.name
    role = "distilled" if config.has_teacher else config.role
    return f"{_slug(config.model.arch)}-{_slug(config.data.source)}-{role}"


def _slug(spec: str) -> str:
    """Return the last component of an architecture or data source: `hub:uoft-cs/cifar10@v1` -> `cifar10`."""
    kind, _, place = spec.partition(":")
    revision = "@.*" if kind == "hub" else "$"
    parts = [_safe(part) for part in re.split(r"[/\\:]", re.sub(revision, "", place or kind))]
    return next((part for part in reversed(parts) if part), _safe(kind) or "unnamed")


def _safe(text: str) -> str:
    """Return text with ASCII letters, digits, dots, hyphens and underscores only, of limited length."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._]+", "-", ascii_text)[:_LONGEST_PART].strip("-._")
