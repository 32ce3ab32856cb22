"""Running a command inside the test process, where what counts is what it says: no interpreter starts, so it takes a tenth."""

import contextlib
import io
import os

from accelerate.state import AcceleratorState

from kd_accel.cli import main
from tests.launching import SMALL, environment


def say(*argv, code=0):
    """What the command printed, on both streams; it must end with `code`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out, before = io.StringIO(), dict(os.environ)
    os.environ.update(environment())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            ended = 0
            try:
                main([str(argument) for argument in argv])
            except SystemExit as stop:
                ended = stop.code
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert ended == code, out.getvalue()
    return out.getvalue()


def train(run_dir, *flags, code=0):
    return say("train", f"--run_dir={run_dir}", *SMALL, *flags, code=code)


def cache(action, *flags, code=0):
    return say("cache", action, *SMALL, *flags, code=code)
