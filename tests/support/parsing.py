"""Parsing of flags as the commands do it, and the message of what is refused."""

import pytest
from pydantic import BaseModel

from kd_accel.config import schema
from kd_accel.config.command_line import CommandParser
from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.errors import UserError

LOSSES = {"logits": ["kl"], "features": ["mse"]}
SECTIONS = [
    each
    for each in vars(schema).values()
    if isinstance(each, type) and issubclass(each, BaseModel) and each not in (BaseModel, schema.Section)
]


def parse(*argv, config_class=RunConfig):
    parser = CommandParser("x", "", "", config_class=config_class, losses=LOSSES)
    return parse_config(config_class, argv, parser=parser)[0]


def mistakes(*argv, config_class=RunConfig):
    with pytest.raises(UserError) as caught:
        parse(*argv, config_class=config_class)
    return str(caught.value)
