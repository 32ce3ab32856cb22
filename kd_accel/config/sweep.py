"""Sweep over a grid of settings: its trials, each a valid config and a name that is safe in a path.

In: config files and flags for all trials, and `--over NAME=V1,V2,...` for each setting of the grid. Out: the trials in the
order of the grid; the last setting varies fastest. A setting without effect in some of the trials is left out of these, and
trials that are equal without it are one.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kd_accel.config.command_line import CommandParser
from kd_accel.config.loss_weights import value_range
from kd_accel.config.parsing import check_settings, listed_mistakes
from kd_accel.config.rules import WithoutEffect, no_effect
from kd_accel.config.schema import RunConfig
from kd_accel.config.seeds import parse_seeds
from kd_accel.config.settings import COMMAND_LINE, Settings, nested
from kd_accel.config.validation import problems
from kd_accel.errors import UserError
from kd_accel.io.safe_yaml import dump_yaml, load_yaml, place

_MAX_TRIALS = 1000
_MAX_VALUE, _MAX_NAME = 24, 120
_LARGE = 1e9
"""Size from which a number is not written without its decimal point."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_OF_A_RUN = {
    "seed": "the seeds are those of --seeds",
    "run_dir": "each run has a directory of its own; --out DIR is that of the sweep",
    "name": "each run is named after its trial",
}
"""Settings that differ between the runs of a sweep, with the reason why they are not part of the grid."""


@dataclass(frozen=True)
class Trial:
    """One point of the grid.

    Attributes:
        name: Name, such as `temperature=2,alpha=0.5`.
        values: Values by dotted name, without the settings that are left out.
        config: Config without the name, directory and seed of a run.
    """

    name: str
    values: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True)
class Sweep:
    """All trials, each with several seeds.

    Attributes:
        directory: Directory of the sweep.
        over: Dotted names of the settings of the grid.
        trials: Trials in the order of the grid.
        seeds: Seeds.
        notices: Lines about settings that are left out and equal trials.
    """

    directory: Path
    over: Sequence[str]
    trials: Sequence[Trial]
    seeds: Sequence[int]
    notices: Sequence[str]

    def runs(self) -> Iterator[tuple[Trial, RunConfig]]:
        """Yield the runs: all trials with the first seed, then with the next one."""
        for seed, trial in itertools.product(self.seeds, self.trials):
            yield trial, self.run(trial, seed)

    def run(self, trial: Trial, seed: int) -> RunConfig:
        """Return the config of a run."""
        name = f"{trial.name}-seed{seed}"
        return trial.config.model_copy(update={"name": name, "run_dir": str(self.directory / name), "seed": seed})

    def settings_of(self, trial: Trial) -> dict[str, Any]:
        """Return the settings of a trial that are not defaults, for a run apart from the sweep."""
        settings = trial.config.model_dump(mode="json", exclude_unset=True, exclude={"name", "run_dir", "seed"})
        return {"name": f"{trial.config.name}-best", "seed": self.seeds[0], **settings}


@dataclass
class _Point:
    """One point of the grid before equal ones are merged."""

    name: str
    values: dict[str, Any]
    config: RunConfig | None
    mistakes: list[str]
    left_out: dict[str, WithoutEffect] = field(default_factory=dict)


def parse_sweep(argv: Sequence[str], *, parser: CommandParser) -> tuple[Sweep, argparse.Namespace]:
    """Parse and check the command line of a sweep, with all of its trials.

    Args:
        argv: The command's own arguments, among them `over`, `seeds` and `out`; config files and flags.
        parser: Parser of these arguments.

    Returns:
        The sweep, and the values of the command's own arguments.

    Raises:
        UserError: If a setting is not valid in a trial. The message lists every mistake, and the trials that it is in.
    """
    flags, own = parser.split(argv)
    arguments, base = parser.parse(own), Settings(RunConfig)
    for name in (name for name, _ in flags if name in ("seed", "run_dir")):
        base.mistakes.append(f"--{name}: cannot be set for a sweep: {_OF_A_RUN[name]}")
    for path in arguments.config:
        base.add_file(path)
    base.add_flags([flag for flag in flags if flag[0] not in ("seed", "run_dir")])
    grid = _grid(arguments.over, base.mistakes)
    seeds = None if arguments.seeds is None else parse_seeds(arguments.seeds, base.mistakes)
    points = [_point(base, grid, values, parser) for values in itertools.product(*grid.values())]
    mistakes = _grouped(points)
    trials, notices = _merged(points)
    if not mistakes and len(points) > 1 and len(trials) == 1:
        mistakes = [f"--over: the {len(points)} trials are equal ({'; '.join(notices)}); use settings that have an effect"]
    if mistakes:
        raise UserError(listed_mistakes(mistakes))
    if arguments.print_config:
        print(dump_yaml({trial.name: trial.config.model_dump(mode="json") for trial in trials}), end="")
        raise SystemExit(0)
    first = trials[0].config
    directory = arguments.out or Path(f"{first.directory}-sweep")
    return Sweep(directory, list(grid), trials, seeds or [first.seed], [*notices, *_selection_notices(trials)]), arguments


def _grid(texts: Sequence[str], mistakes: list[str]) -> dict[str, list[Any]]:
    """Return the values of each setting by its dotted name; settings with a mistake are left out."""
    grid: dict[str, list[Any]] = {}
    for name, has_values, text in (each.partition("=") for each in texts):
        name = name.removeprefix("--")
        if not has_values:
            mistakes.append(f"--over {name}: must have the form NAME=V1,V2,...")
        elif name in _OF_A_RUN:
            mistakes.append(f"--over {name}: is not a setting of the grid: {_OF_A_RUN[name]}")
        elif name in grid:
            mistakes.append(f"--over {name}: is given twice; list all values in one --over")
        elif values := _values(name, text, mistakes):
            grid[name] = values
    count = 1
    for values in grid.values():
        count *= len(values)
    if count > _MAX_TRIALS:
        mistakes.append(f"--over: {count} trials, but at most {_MAX_TRIALS} are supported; list fewer values")
        return {name: values[:1] for name, values in grid.items()}
    return grid


def _values(name: str, text: str, mistakes: list[str]) -> list[Any]:
    """Return the values of a list in YAML without its brackets; empty after a mistake."""
    remedy = "write NAME=V1,V2,..., and put a text with a comma, colon or bracket in quotes"
    try:
        values = load_yaml(f"[{text}]")
    except (yaml.YAMLError, ValueError) as error:
        mistakes.append(f"--over {name}: {text!r} is not a list of values ({place(error)}); {remedy}")
        return []
    texts = [value_text(value) for value in values]
    repeated = [text for text in dict.fromkeys(texts) if texts.count(text) > 1]
    if not values:
        mistakes.append(f"--over {name}: has no value; {remedy}")
    elif repeated:
        mistakes.append(f"--over {name}: {repeated[0]} is listed twice; list each value once")
    return list(values)


def _point(base: Settings, grid: Mapping[str, Any], values: Sequence[Any], parser: CommandParser) -> _Point:
    """Check one point of the grid, without the settings that have no effect in it."""
    settings, given = copy.deepcopy(base), dict(zip(grid, values, strict=True))
    for name, value in given.items():
        settings.add(nested(tuple(name.split(".")), value), COMMAND_LINE)
    left_out: dict[str, WithoutEffect] = {}
    # One at a time: two settings that make each other idle must not both be left out.
    while (idle := _idle_setting(settings.values)) is not None and idle.setting not in left_out:
        left_out[idle.setting] = idle
        _remove(settings.values, idle.setting)
    config, mistakes = check_settings(settings, parser.losses, parser.options())
    kept = {name: value for name, value in given.items() if not _is_left_out(name, left_out)}
    return _Point(_name(kept, list(grid)), kept, config, mistakes, left_out)


def _is_left_out(name: str, left_out: Mapping[str, WithoutEffect]) -> bool:
    """Return whether a setting of the grid is left out, unless its own value is the reason, as a weight of 0 is."""
    causes = {message.partition(":")[0] for setting, message in left_out.items() if setting != name}
    return name not in causes and any(f"{name}.".startswith(f"{setting}.") for setting in left_out)


def _idle_setting(values: Mapping[str, Any]) -> WithoutEffect | None:
    """Return the message about the first setting without effect; None without one, or if another mistake is found first."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError:  # reported with all other mistakes
        return None
    found = (problem for problem in [*problems(config), *_without_logit_loss(config)] if isinstance(problem, WithoutEffect))
    return next(found, None)


def _without_logit_loss(config: RunConfig) -> Iterator[str]:
    """Yield a message for each setting of a logit loss whose weight is 0. A training accepts these, as it logs the loss."""
    distill = config.distill
    if distill is not None and distill.logits is not None and value_range(distill.alpha)[1] == 0:
        yield from no_effect(distill, "distill", ("temperature", "logits"), because="with distill.alpha 0")


def _remove(values: dict[str, Any], name: str) -> None:
    """Remove the setting of a dotted name. A key may have dots itself, as that of a feature loss by `import:`."""
    for key in sorted(values, key=len, reverse=True):
        if name == key:
            del values[key]
            return
        if name.startswith(f"{key}."):
            _remove(values[key], name.removeprefix(f"{key}."))
            return


def _grouped(points: Sequence[_Point]) -> list[str]:
    """Return each mistake once, with the trials that it is in unless it is in all."""
    found: dict[str, list[str]] = {}
    for point in points:
        for mistake in dict.fromkeys(point.mistakes):
            found.setdefault(mistake, []).append(point.name)
    # A setting that no trial uses is a mistake, as it is in a training.
    for setting in set.intersection(*(set(point.left_out) for point in points)):
        found[points[0].left_out[setting]] = [point.name for point in points]
    return [text if len(names) == len(points) else f"{text} (in {_listed(names)})" for text, names in found.items()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"trial {names[0]}{more}"


def _merged(points: Sequence[_Point]) -> tuple[list[Trial], list[str]]:
    """Return the distinct trials, and notices about settings that are left out and trials that are equal."""
    trials: dict[str, Trial] = {}
    left_out: dict[str, list[str]] = {}
    equal: dict[str, int] = {}
    for point in points:
        for message in point.left_out.values():
            left_out.setdefault(message, []).append(point.name)
        if point.config is None:
            continue
        same = trials.setdefault(str(point.config.model_dump()), Trial(point.name, point.values, point.config))
        equal[same.name] = equal.get(same.name, 0) + 1
    notices = [f"left out of {_listed(list(dict.fromkeys(names)))}: {message}" for message, names in left_out.items()]
    notices += [f"trial {name}: stands for {count} equal points of the grid" for name, count in equal.items() if count > 1]
    return list(trials.values()), notices


def _selection_notices(trials: Sequence[Trial]) -> list[str]:
    if all(trial.config.data.val_fraction > 0 or trial.config.data.val_split not in (None, "auto") for trial in trials):
        return []
    return [
        "data.val_fraction: 0, so that without a validation split in the source no best trial is chosen: the test split must "
        "not decide"
    ]


def _name(values: Mapping[str, Any], over: Sequence[str]) -> str:
    """Return the name of a trial: each setting by the shortest end of its dotted name that is unique in the grid."""
    name = ",".join(f"{_short(setting, over)}={_safe(value_text(value))}" for setting, value in values.items()) or "plain"
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 9]}-{_digest(name)}"


def _short(setting: str, over: Sequence[str]) -> str:
    parts = setting.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
    is_unique = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in over) == 1)
    return _UNSAFE.sub("-", next(is_unique, setting))


def value_text(value: Any) -> str:
    """Return a value as YAML in one line, equal numbers as equal texts: 1 for 1.0."""
    value = int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _LARGE else value
    return " ".join(dump_yaml(value, in_one_line=True).removesuffix("...\n").split())


def _safe(text: str) -> str:
    """Return a text that is safe in a file name, with a digest if the text itself is too long or not safe."""
    safe = _UNSAFE.sub("-", text)
    return safe if safe == text and len(text) <= _MAX_VALUE else f"{safe[: _MAX_VALUE - 9].strip('-')}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
