"""Settings of an evaluation: those of a finished run, with changes to its data, its teacher and the size of its batches.

A run stores all its settings. Some of them can lose their effect by a change, as the columns of the run's own source do if the
data is another; those that the user has not typed are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kd_accel.config.command_line import CommandParser
from kd_accel.config.fields import Keys, as_one_teacher, exists
from kd_accel.config.parsing import checked_config
from kd_accel.config.schema import RunConfig
from kd_accel.config.settings import CALL, COMMAND_LINE, Settings, nested
from kd_accel.config.validation import problems

_TAKEN = ("data", "teacher", "teachers", "train.eval_batch_size", "train.precision")
_BY_REASON_REFUSED = {
    "model.json determines it": "data.image_size data.mean data.std",
    "held-out samples are not augmented": "data.transform data.views data.view_seed",
    "no training samples are read": "data.sampling data.unlabeled data.unlabeled_split data.unlabeled_ratio",
    "a training checks it": "teacher.min_accuracy",
    "it decides the contents of a new cache": "teacher.cache.dtype teacher.cache.shard_mib teacher.cache.batch_size",
}
_REFUSED = {name: reason for reason, names in _BY_REASON_REFUSED.items() for name in names.split()}
_NO_EFFECT = ": has no effect"


def is_evaluation_setting(name: str) -> bool:
    """Return whether a setting, by its dotted name, can be changed for an evaluation."""
    is_taken = any(name == each or name.startswith(f"{each}.") for each in _TAKEN)
    return is_taken and as_one_teacher(name) not in _REFUSED


def parse_evaluation(argv: Sequence[str], *, parser: CommandParser) -> tuple[list[RunConfig], argparse.Namespace]:
    """Parse and check the command line of an evaluation of one or several runs.

    Args:
        argv: The command's own arguments, among them the run directories `runs`, and flags.
        parser: Parser of these arguments.

    Returns:
        The config of each run with the changes of the flags, and the values of the command's own arguments.

    Raises:
        UserError: If the directory has no config, or a setting is not valid. The message lists every mistake.
    """
    flags, own = parser.split(argv)
    arguments, configs = parser.parse(own), []
    for run in arguments.runs:
        settings = Settings(RunConfig)
        _add_run(settings, run)
        settings.add_flags(flags)
        configs.append(_checked(settings, parser.losses, parser.options()))
    return configs, arguments


def build_evaluation(run: Path, changes: Mapping[str, Any], *, losses: Mapping[str, Sequence[str]]) -> RunConfig:
    """Build and check the config of an evaluation from Python.

    Args:
        run: Run directory.
        changes: Values by dotted name.
        losses: Names of the registered losses by kind.

    Raises:
        UserError: If the directory has no config, or a setting is not valid. The message lists every mistake.
    """
    settings = Settings(RunConfig)
    _add_run(settings, run)
    for name, value in changes.items():
        settings.add(nested(tuple(name.split(".")), value), CALL)
    return _checked(settings, losses, ())


def _add_run(settings: Settings, run: Path) -> None:
    config_file = run / "config.yaml"
    if config_file.is_file():
        settings.add_file(str(config_file))
        settings.values.pop("role", None)  # a label, which excludes a teacher
    else:
        settings.mistakes.append(
            f"{config_file}: is missing: no finished run in this directory; train it first, or choose another directory"
        )


def _checked(settings: Settings, losses: Mapping[str, Sequence[str]], command_options: Sequence[str]) -> RunConfig:
    changed = {keys: where for keys, where in settings.origins.items() if where in (COMMAND_LINE, CALL)}
    sections = {keys[:length] for keys in changed for length in range(1, len(keys))}
    for keys in sorted(changed.keys() - sections):
        name = ".".join(keys)
        if exists(RunConfig, keys) and not is_evaluation_setting(name):
            reason = _REFUSED.get(as_one_teacher(name), f"only {', '.join(_TAKEN[:-1])} and {_TAKEN[-1]} can be changed")
            shown = f"--{name}" if changed[keys] == COMMAND_LINE else name
            settings.mistakes.append(f"{shown}{_NO_EFFECT} on an evaluation ({reason}); leave it out")
            _remove(settings.values, keys)
    if any(keys[0] in ("teacher", "teachers") for keys in changed):
        _leave_out_losses(settings.values)
    _leave_out_label_weight(settings.values)
    _leave_out_ineffective(settings)
    config: RunConfig = checked_config(settings, losses, command_options)
    return config


def _leave_out_losses(values: dict[str, Any]) -> None:
    """Reduce the objective of the run to the combination of several teachers: the losses belong to the run's own teachers."""
    if isinstance(distill := values.get("distill"), dict):
        values["distill"] = {"ensemble": distill["ensemble"]} if distill.get("ensemble") else None


def _leave_out_label_weight(values: dict[str, Any]) -> None:
    """Take the weight from labels that are not read: an evaluation has no loss, and measures the agreement alone."""
    data = values.get("data")
    if isinstance(data, dict) and data.get("label_column", "") is None and (values.get("teacher") or values.get("teachers")):
        values["distill"] = {**(values.get("distill") or {}), "label_weight": 0.0}


def _leave_out_ineffective(settings: Settings) -> None:
    """Reset the settings of the run that have no effect with the changes to their defaults."""
    while True:
        try:
            broken = problems(RunConfig.model_validate(settings.values))
        except ValidationError:  # reported with all other mistakes
            return
        named = (tuple(rule.partition(_NO_EFFECT)[0].split(".")) for rule in broken if _NO_EFFECT in rule)
        left_out = [keys for keys in named if settings.origin(keys) not in (COMMAND_LINE, CALL, None)]
        if not left_out:
            return
        for keys in left_out:
            _remove(settings.values, keys)


def _remove(values: dict[str, Any], keys: Keys) -> None:
    for key in keys[:-1]:
        values = values.get(key) or {}  # removed with a section above
    values.pop(keys[-1], None)
