"""Settings in which runs differ, and texts without the paths of a machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kd_accel.config.fields import flatten
from kd_accel.config.schema import DistillConfig, TeacherConfig
from kd_accel.io.safe_yaml import dump_yaml
from kd_accel.report.groups import compared_settings
from kd_accel.report.run_files import RunResult

_SECTIONS = {"teacher": TeacherConfig(), "distill": DistillConfig()}
_DEFAULTS = flatten({name: section.model_dump(mode="json") for name, section in _SECTIONS.items()})
"""Defaults of the sections that a run without a teacher lacks."""
_ALWAYS_SHOWN = ("distill.temperature", "distill.alpha")
"""Settings that are shown also with their default next to a run without them."""
_PART = r"[^/\n'\",:]+"
_ABSOLUTE = re.compile(rf"(?<![\w.~/])(?:(?:/{_PART})+/(?={_PART}/{_PART})|/(?={_PART}))")
"""Part of an absolute path before its last two names."""


def differing_settings(results: Sequence[RunResult]) -> list[tuple[str, list[str | None]]]:
    """Return the settings in which runs differ, in the order of config.yaml.

    Name, directory and tracking of a run are left out. So are defaults of a section that some runs lack, such as `teacher`, and
    runs without config.yaml.

    Returns:
        Dotted names with the text of each run; None for a run without the setting.
    """
    with_seeds = [{**_seed(result), **compared_settings(result)} for result in results]
    names = dict.fromkeys(name for settings in with_seeds for name in settings)
    known = [settings for settings in with_seeds if settings]
    differing = [name for name in names if _is_shown(name, [one[name] for one in known if name in one], len(known))]
    return [(name, [_text(settings[name]) if name in settings else None for settings in with_seeds]) for name in differing]


def without_machine_paths(text: str) -> str:
    """Return a text in which absolute paths are reduced to their last two names."""
    return _ABSOLUTE.sub("…/", text)


def _seed(result: RunResult) -> dict[str, Any]:
    return {"seed": result.settings["seed"]} if "seed" in result.settings else {}


def _is_shown(name: str, values: Sequence[Any], runs: int) -> bool:
    """Return whether runs differ in a setting. values: Those of the runs that have it."""
    if len(values) == runs:
        return any(value != values[0] for value in values)
    usual: tuple[Any, ...] = (None, [], {}) if name.startswith(_ALWAYS_SHOWN) else (None, [], {}, _DEFAULTS.get(name))
    return any(value not in usual for value in values)


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return without_machine_paths(value or "null")
    return without_machine_paths(dump_yaml(value, in_one_line=True).removesuffix("...\n").strip())
