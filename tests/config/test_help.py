"""`--help`: type, default and description of every setting, from the docstrings of the schema."""

import re
import typing

import pytest
import yaml

from kd_accel.cli import main
from kd_accel.config.fields import leaves, options
from kd_accel.config.help import descriptions, settings_help
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig
from tests.support.parsing import SECTIONS


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--help"])
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_descriptions_match_the_settings(section):
    assert list(descriptions(section)) == list(section.model_fields)
    assert all(text[0] == text[0].upper() and text.endswith(".") for text in descriptions(section).values())


@pytest.mark.parametrize("config_class", [RunConfig, BenchConfig, ReproduceConfig])
def test_help_lists_each_setting_with_its_description(config_class):
    text = " ".join(settings_help(config_class, {}).split())
    for keys, _ in leaves(config_class):
        assert f"--{'.'.join(keys)} " in text
    for section in SECTIONS if config_class is RunConfig else [config_class]:
        if section not in (BenchConfig, ReproduceConfig) or section is config_class:
            assert all(description in text for description in descriptions(section).values()), section


@pytest.mark.parametrize("argv", [["train"], ["cache", "build"], ["cache", "info"], ["plan"]])
def test_help_of_the_commands_that_take_a_run(capsys, argv):
    text = help_of(capsys, *argv)
    for line in (
        "  --data.image_size INT  (default 32) Side of the square",
        "  --train.compile BOOL  (default false) Compile",
        "  --train.precision float32|bf16|fp16  (default float32) ",
        "  --optim.betas [FLOAT, ...]  (default [0.9, 0.999]) ",
        "  --teacher.run TEXT|null  (default null) Run directory of the teacher;",
        "  --teacher.cache.shard_mib FLOAT  (default 64.0) Size",
        "  --distill.temperature FLOAT|SCHEDULE  (default 4.0) T,",
        "  --distill.logits.args {KEY: VALUE, ...}  (default {}) ",
        "  --distill.features.NAME.layers auto|[TEXT, ...]|{KEY: TEXT, ...}  (default [layer1, layer2, layer3, layer4]) ",
        "  --a.b.start FLOAT  (required) Value at the beginning.",
        "teacher:  (default null) The teacher; null = plain training, or several teachers.",
        "teachers.NAME: Several teachers by name, in place of teacher.",
        "--teachers.NAME.weight FLOAT|SCHEDULE  (default 1.0) Weight of the teacher in the mean of all teachers",
        "--teachers.NAME.cache.dir TEXT|null",
        "losses (logits): dist, dkd, kl, nkd,",
        "losses (features): ",
        "--allow_import",
    ):
        assert line in text, line
    assert ("--json" in text) == (argv[-1] in ("info", "plan"))


def test_help_of_other_commands(capsys):
    assert "  --batch_sizes [INT, ...]  (default [1, 32]) Images per forward." in help_of(capsys, "bench")
    assert "  --runs [TEXT, ...]  (required) Config files" in help_of(capsys, "reproduce")
    text = help_of(capsys, "evaluate")
    assert "--split {test,val}" in text and "  --data.source TEXT  (default digits) Data set" in text
    assert "--out" in help_of(capsys, "report")


@pytest.mark.parametrize("argv", [["train"], ["cache", "verify"], ["plan"], ["evaluate"], ["bench"], ["layers"], ["reproduce"]])
def test_help_of_arguments_is_in_sentences(capsys, argv):
    arguments = help_of(capsys, *argv).partition("--allow_import")[0].partition("\n\n")[2]
    texts = re.findall(r"^  \S.*?  +(\S(?:.|\n {4,})*)$", arguments, re.MULTILINE)
    assert len(texts) >= 2
    assert all(text[0] == text[0].upper() and text.endswith(".") for text in texts), texts


def literals_of(annotation):
    for option in options(annotation):
        if typing.get_origin(option) is typing.Literal:
            yield from typing.get_args(option)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_each_choice_is_text_in_yaml(section):
    """`no` without quotes, for example, is false in YAML."""
    for name, field in section.model_fields.items():
        for choice in literals_of(field.annotation):
            assert yaml.safe_load(f"{name}: {choice}") == {name: choice}
