"""Parsing of command lines as in a command, and the message for a refused command line."""

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
    """Return the config of a command line."""
    parser = CommandParser("x", "", "", config_class=config_class, takes_files=True, losses=LOSSES)
    return parse_config(config_class, argv, parser=parser)[0]


def mistakes(*argv, config_class=RunConfig):
    """Return the message of the UserError for a command line."""
    with pytest.raises(UserError) as caught:
        parse(*argv, config_class=config_class)
    return str(caught.value)
