"""The program with a function replaced, for behavior that is not visible from outside.

    python -m tests.support.patched_program PATCH ARGUMENTS

PATCH is one of:

- `flushes`: append each file of a cache that a process flushes to disk to KD_TEST_FLUSHES-RANK.
- `fails`: raise an unexpected error on rank 0, while its peers wait for rank 0.
- `holds`: hold the training before a step, as `tests.support.holding.Hold` describes.
- `holds_on`: hold it also after a signal.
- `breaks`: raise an error before this step.
- `fills_buckets`: exchange the gradients in buckets of about 100 bytes, each of one or a few parameters.
- `closes_slowly`: hold it as `holds` does, and take five seconds to close the checkpoint writer.

The processes of a launch begin when all of them have imported the program, because the time of the imports varies by seconds.
"""

import os
import sys
import time
from functools import partialmethod
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from kd_accel.cache import manifest
from kd_accel.cli import main
from kd_accel.commands import cache, train  # noqa: F401  (the imports of the commands)
from kd_accel.training.checkpoint import CheckpointWriter
from kd_accel.training.run_dir import RunDirectory
from kd_accel.training.step import TrainStep
from kd_accel.training.trainer import Trainer
from tests.support.holding import DIRECTORY, STEP, mark, wait_until

RANK = os.environ.get("RANK", "0")


def record_flushes():
    flush = manifest.flush

    def recorded(path):
        with open(f"{os.environ['KD_TEST_FLUSHES']}-{RANK}", "a") as file:
            file.write(f"{path}\n")
        flush(path)

    manifest.flush = recorded


def fail():
    RunDirectory.finished_summary = lambda self: 1 // 0


def hold(*, is_ended_by_signal=True):
    directory, step, fit_epoch, trainers = Path(os.environ[DIRECTORY]), TrainStep.__call__, Trainer.fit_epoch, []

    def recorded(self):
        trainers[:] = [self]
        fit_epoch(self)

    def held(self, *arguments):
        if self.train_state.position.step == int(os.environ[STEP]):
            mark(directory / f"held-{RANK}")
            preemption = trainers[0].preemption
            # A signal ends the hold, so that the steps after it are those in which the ranks agree on a stop.
            wait_until(lambda: (is_ended_by_signal and preemption._signal) or (directory / "released").exists())
        step(self, *arguments)

    Trainer.fit_epoch, TrainStep.__call__ = recorded, held


def break_in_step():
    step = TrainStep.__call__

    def broken(self, *arguments):
        if self.train_state.position.step == int(os.environ[STEP]):
            raise ZeroDivisionError
        step(self, *arguments)

    TrainStep.__call__ = broken


def close_slowly():
    hold()
    CheckpointWriter.close = lambda self: time.sleep(5)


def fill_buckets():
    initialize, bucket_bytes = DistributedDataParallel.__init__, 100
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = bucket_bytes
    DistributedDataParallel.__init__ = partialmethod(initialize, bucket_cap_mb=bucket_bytes / 2**20)


def hold_on():
    hold(is_ended_by_signal=False)


def wait_for_imports(directory):
    mark(directory / f"imported-{RANK}")
    ranks = range(int(os.environ.get("WORLD_SIZE", "1")))
    wait_until(lambda: all((directory / f"imported-{rank}").exists() for rank in ranks))


PATCHES = {
    "flushes": record_flushes,
    "fails": fail,
    "holds": hold,
    "holds_on": hold_on,
    "breaks": break_in_step,
    "fills_buckets": fill_buckets,
    "closes_slowly": close_slowly,
}

if __name__ == "__main__":
    patch, *arguments = sys.argv[1:]
    PATCHES[patch]()
    if DIRECTORY in os.environ:
        wait_for_imports(Path(os.environ[DIRECTORY]))
    main(arguments)
