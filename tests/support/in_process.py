"""Commands in the test process, for tests of files and messages: a tenth of the time of a new process."""

import contextlib
import io
import os

from kd_accel.cli import main
from tests.support.launching import SMALL, environment


def say(*argv, code=0):
    """Run a command and return its output on both streams. Its exit code must be `code`."""
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
