"""Parsing of flags as the commands do it, and the message of what is refused."""

import pytest

from kd_accel.config.command_line import CommandParser
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.errors import UserError

LOSSES = {"logits": ["kl"], "features": ["mse"]}


def parse(*argv, config_class=RunConfig):
    parser = CommandParser("x", "", "", config_class=config_class, losses=LOSSES)
    return parse_config(config_class, argv, parser=parser)[0]


def mistakes(*argv, config_class=RunConfig):
    with pytest.raises(UserError) as caught:
        parse(*argv, config_class=config_class)
    return str(caught.value)
