"""The program with a function replaced, for what is not seen from outside: `python -m tests.patched_program PATCH ARGUMENTS`.

PATCH: `flushes` appends each file that a process flushes to the disk to KD_TEST_FLUSHES-RANK; `fails` has rank 0 fail in a way
that nobody foresaw, while the others wait for it.
"""

import os
import sys

from kd_accel.cache import manifest
from kd_accel.cli import main
from kd_accel.commands import train


def record_flushes():
    flush = manifest.flush

    def recorded(path):
        with open(f"{os.environ['KD_TEST_FLUSHES']}-{os.environ['RANK']}", "a") as file:
            file.write(f"{path}\n")
        flush(path)

    manifest.flush = recorded


def fail():
    train.finished_summary = lambda config: 1 // 0


if __name__ == "__main__":
    {"flushes": record_flushes, "fails": fail}[sys.argv[1]]()
    main(sys.argv[2:])
