"""The program with a function replaced, for behavior that is not visible from outside.

    python -m tests.support.patched_program PATCH ARGUMENTS

PATCH: `flushes` appends each file of a cache that a process flushes to the disk to KD_TEST_FLUSHES-RANK; `fails` raises an
unforeseen error on rank 0, while its peers wait for rank 0.
"""

import os
import sys

from kd_accel.cache import manifest
from kd_accel.cli import main
from kd_accel.training.run_dir import RunDirectory


def record_flushes():
    flush = manifest.flush

    def recorded(path):
        with open(f"{os.environ['KD_TEST_FLUSHES']}-{os.environ['RANK']}", "a") as file:
            file.write(f"{path}\n")
        flush(path)

    manifest.flush = recorded


def fail():
    RunDirectory.finished_summary = lambda self: 1 // 0


if __name__ == "__main__":
    {"flushes": record_flushes, "fails": fail}[sys.argv[1]]()
    main(sys.argv[2:])
