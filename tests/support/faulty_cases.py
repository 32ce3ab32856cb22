"""Cases of the acceptance test that fail in each possible way; the builders are `tests.support.faulty_cases:NAME`."""

import os
import signal
import sys
import time

from kd_accel.errors import UserError
from tests.support.models import student


def build(setting, part):
    """Return cases that run in a child process."""
    return {
        "passes": lambda: {"pid": os.getpid()},
        "wrong_figures": lambda: {"ok": False, "difference": 1.5},
        "raises": raises,
        "raises_in_kd_accel": raises_in_kd_accel,
        "exits": lambda: sys.exit(4),
        "cuda_error": cuda_error,
        "crashes": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hangs": lambda: time.sleep(600),
        "passes_later": lambda: {"pid": os.getpid()},
    }


def build_commands(setting, starter):
    """Return cases that start commands."""
    return {
        "command": lambda: {"printed": starter.command("version", "--version").finish(60).strip()},
        "refused": lambda: starter.command("refused", "trane").finish(60),
        "hangs": lambda: starter.start("hangs", time.sleep, 600).finish(60),
        "never_started": lambda: {},
    }


def failing_build(setting, part):
    raise UserError("the network cannot be built\nfor a reason")


def raises():
    raise ValueError("first line\nsecond line\n" + "\n".join(map(str, range(20))))


def raises_in_kd_accel():
    from kd_accel.models.feature_extractor import FeatureExtractor

    FeatureExtractor(student(2), ["no_such_module"]).open()


def cuda_error():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
