"""CHANGELOG.md: the form of Keep a Changelog, and the table of renamed settings against the program."""

import re
from pathlib import Path

import pytest

import kd_accel
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.errors import UserError
from kd_accel.losses import KL, MSE
from tests.support.in_process import say

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CHANGELOG.md").read_text()
RENAMED = re.findall(r"^  \| `(\S+)(?: (\w+))?` \| `(\S+)(?: (\w+))?`", PAGE, re.MULTILINE)
TEACHER = "--teacher.run=runs/teacher"


@pytest.fixture(scope="module")
def settings():
    """Names of all settings; NAME stands for the name of a feature loss."""
    return set(re.findall(r"^  --(\S+) ", say("train", "--help"), re.MULTILINE))


def test_versions_have_dates_and_the_last_one_is_the_package():
    unreleased, *released = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", PAGE, re.MULTILINE)
    assert unreleased == ("Unreleased", "")
    assert released[0][0] == kd_accel.__version__
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released)


def test_changes_are_grouped_in_the_usual_order():
    usual = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    for version in PAGE.split("\n## ")[1:]:
        groups = re.findall(r"^### (\w+)$", version, re.MULTILINE)
        assert groups == [name for name in usual if name in groups], version.splitlines()[0]


def test_all_renamed_settings_are_found():
    assert len(RENAMED) == 13


@pytest.mark.parametrize(("old", "value"), [(old, value or "1") for old, value, _, _ in RENAMED])
def test_old_name_is_refused(old, value):
    with pytest.raises(UserError, match="no such setting|must be one of"):
        parse_config(RunConfig, [TEACHER, f"--{old}={value}"])


@pytest.mark.parametrize(("new", "value"), [(new, value) for _, _, new, value in RENAMED])
def test_new_name_is_a_setting(new, value, settings):
    section, _, argument = new.partition(".args.")
    if argument:
        assert argument in {"distill.logits": KL, "distill.features.mse": MSE}[section].Settings.model_fields
    else:
        assert new.replace(".mse", ".NAME") in settings
    if value:
        parse_config(RunConfig, [TEACHER, f"--{new}={value}"])
