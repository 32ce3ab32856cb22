"""Tests of the time limit of tests."""

import subprocess
import sys

import pytest

from tests.support.launching import ROOT, environment

LIMITED = """
from tests.support import time_limit

pytest_plugins = ["tests.support.time_limit"]
time_limit.LIMIT_S = 0.5
"""
CASES = {
    "always": ("time.sleep(0.9)", 1, "more than 0.5 s: mark it slow, or make it faster"),
    "the_first_time": ("time.sleep(0 if MARK.exists() else 0.6); MARK.touch()", 0, "above the limit of 0.5 s, run once more"),
    "nearly": ("time.sleep(0.6)", 0, "above the limit of 0.5 s, run once more"),
    "never": ("time.sleep(0.1)", 0, "1 passed"),
    "marked": ("time.sleep(0.6)", 0, "1 passed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_test_that_is_slow_twice_fails_the_run(tmp_path, case):
    statement, code, message = CASES[case]
    mark = "@pytest.mark.slow\n" if case == "marked" else ""
    (tmp_path / "conftest.py").write_text(LIMITED)
    imports = f"import pathlib, pytest, time\nMARK = pathlib.Path({str(tmp_path / 'mark')!r})\n"
    (tmp_path / "test_it.py").write_text(f"{imports}{mark}def test_it():\n    {statement}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == code and message in done.stdout, done.stdout + done.stderr
    assert ("once more" in done.stdout) == (case in ("always", "the_first_time", "nearly"))
