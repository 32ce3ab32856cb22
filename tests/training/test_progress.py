"""Progress display: a bar on a terminal, plain lines elsewhere, with loss, accuracy, images per second and time left."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from contextlib import suppress

import pytest

from tests.support.launching import ROOT, SMALL, command, environment, train


def test_plain_lines_without_a_terminal(tmp_path):
    lines = [line for line in train(tmp_path / "run", "--train.max_steps=12").stdout.splitlines() if ": step " in line]
    assert len(lines) == 12
    shape = r"student-images-student: step 12/12, loss \d\.\d{4}, accuracy \d+\.\d\d %, \d+ images/s, 0:00 left"
    assert re.fullmatch(shape, lines[-1])


@pytest.mark.slow
def test_a_bar_on_a_terminal(tmp_path):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    process = subprocess.Popen(
        command("train", f"--run_dir={tmp_path / 'run'}", *SMALL),
        cwd=ROOT,
        env=environment(),
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = "".join(_read_all(controller))
    assert process.wait(timeout=60) == 0, shown
    assert re.search(
        r"student-images-student: +100%.* 24/24 \[\d\d:\d\d<00:00.*epoch 3, loss \d\.\d{4}, accuracy .*images/s\]", shown
    )
    assert "student-images-student: epoch 3 done, validation: loss" in shown


def _read_all(descriptor):
    """Yield the output of a program until it closes its terminal."""
    with suppress(OSError):
        while block := os.read(descriptor, 4096):
            yield block.decode(errors="replace")
