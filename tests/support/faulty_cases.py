"""Cases of an acceptance that fail in every way, named as `tests.support.faulty_cases:build`."""

import os
import signal
import time

from kd_accel.errors import UserError
from tests.support.models import student


def build(setting, part):
    """Build the cases of a part in a child process."""
    return {
        "fine": lambda: {"pid": os.getpid()},
        "wrong_figures": lambda: {"ok": False, "difference": 1.5},
        "raises": raises,
        "raises_in_the_program": raises_in_the_program,
        "poisons": poisons,
        "leaves": lambda: raise_it(SystemExit(4)),
        "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hangs": lambda: time.sleep(600),
        "after": lambda: {"pid": os.getpid()},
    }


def build_here(setting, starter):
    """Build the cases of a part that start commands."""
    return {
        "command": lambda: {"printed": starter.command("version", "--version").finish(60).strip()},
        "refused": lambda: starter.command("refused", "trane").finish(60),
        "hangs": lambda: starter.start("hangs", time.sleep, 600).finish(60),
        "never": lambda: {},
    }


def broken_build(setting, part):
    raise UserError("the network cannot be built\nfor a reason")


def raise_it(error):
    raise error


def raises():
    raise ValueError("first line\nsecond line\n" + "\n".join(map(str, range(20))))


def raises_in_the_program():
    from kd_accel.models.feature_extractor import FeatureExtractor

    FeatureExtractor(student(2), ["no_such_module"]).open()


def poisons():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
