"""Commands of docs/experiments.md: each recipe is a shipped config, with flags that the program accepts."""

import re
import shlex
from pathlib import Path

import pytest

from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/experiments.md").read_text()
NOTES = {number: re.search(rf"^\({number}\) `(.+?)`", PAGE, re.MULTILINE)[1] for number in "12"}
FIRST, SECOND = PAGE.split("## The reference pair")


def recipes(section, *more):
    """Return (config, flags) of each row of the tables of validation accuracies."""
    rows = re.findall(r"^\| .+? \| [\d.]+ \| `(\S+)` \|(.*)\|$", section, re.MULTILINE)
    for config, cell in rows:
        flags = [shlex.split(flag) for flag in re.findall(r"`(.+?)`", cell)]
        flags += [shlex.split(NOTES[number]) for number in re.findall(r"\((\d)\)", cell)]
        yield config, [*more, *(word for flag in flags for word in flag)]


PAIR = ["--config", str(ROOT / "configs/cifar10_short/by_resnet50.yaml")]


@pytest.mark.parametrize(("config", "flags"), [*recipes(FIRST), *recipes(SECOND, *PAIR)], ids=str)
def test_recipe_is_a_valid_config(config, flags):
    parsed, _ = parse_config(RunConfig, ["--config", str(ROOT / "configs/cifar10_short" / config), *flags])
    assert parsed.train.epochs * parsed.data.limit_train == 160_000


def test_all_rows_are_found():
    assert len([*recipes(FIRST)]) == 20 and len([*recipes(SECOND)]) == 9


def test_direction_reaches_the_config():
    (flags,) = (flags for _, flags in recipes(FIRST) if any("direction" in flag for flag in flags))
    parsed, _ = parse_config(RunConfig, ["--config", str(ROOT / "configs/cifar10_short/hybrid.yaml"), *flags])
    assert parsed.distill.features["mse"].args == {"direction": "teacher_to_student"}
