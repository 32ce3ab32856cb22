"""Time limit of tests that are not marked slow, as a pytest plugin.

A test above the limit runs once more at the end of the session, alone and with a warm file cache, because on a new machine the
first test that imports a library includes reading it from the disk. The run fails if the test is then above the limit by half,
because a test of nearly three seconds would fail now and then.
"""

import os
import subprocess
import sys

import pytest

LIMIT_S = 3.0
"""Limit of a test, its fixtures included."""
IS_SECOND_TRY = "KD_ACCEL_SECOND_TRY"
SECONDS = pytest.StashKey[float]()
PROPERTY = "above_the_time_limit"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note in the report of a test that it took too long, unless it is marked; on the second try the test fails."""
    report = yield
    item.stash[SECONDS] = item.stash.get(SECONDS, 0.0) + call.duration
    is_marked = any(item.get_closest_marker(name) for name in ("slow", "faults"))
    is_second_try = bool(os.environ.get(IS_SECOND_TRY))
    limit_s = 1.5 * LIMIT_S if is_second_try else LIMIT_S
    if call.when == "call" and report.passed and item.stash[SECONDS] > limit_s and not is_marked:
        report.user_properties.append((PROPERTY, item.nodeid))
        if is_second_try:
            report.outcome = "failed"
            report.longrepr = f"took {item.stash[SECONDS]:.1f} s, more than {LIMIT_S:g} s: mark it slow, or make it faster"
    return report


class SecondTries:
    """Collects the tests above the limit, in the process that receives all reports, and runs them once more."""

    def __init__(self):
        self.tests = []

    def pytest_runtest_logreport(self, report):
        self.tests += [test for name, test in report.user_properties if name == PROPERTY and report.when == "call"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if self.tests and exitstatus == pytest.ExitCode.OK:
            command = [sys.executable, "-m", "pytest", "-q", f"--rootdir={session.config.rootpath}", *self.tests]
            print(f"\nabove the limit of {LIMIT_S:g} s, run once more:", *self.tests, sep="\n  ", flush=True)
            environment = {**os.environ, IS_SECOND_TRY: "1"}
            done = subprocess.run(command, cwd=session.config.rootpath, env=environment, check=False)
            session.exitstatus = done.returncode


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    if not (is_worker or os.environ.get(IS_SECOND_TRY)):
        config.pluginmanager.register(SecondTries(), "second_tries")
