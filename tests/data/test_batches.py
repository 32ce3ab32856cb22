"""Tests of the batch loader: its worker processes live as long as itself, and serve all splits."""

import gc
import os
import time

import numpy as np
import psutil
import pytest

from kd_accel.data.batches import BatchLoader
from kd_accel.data.sources import MemoryImages
from kd_accel.data.transforms import CropFlip
from kd_accel.errors import UserError

SHARES = [(np.arange(start, start + 4), 3) for start in range(0, 20, 4)]


class Recorded(MemoryImages):
    """Image set with the process that decodes it in the first pixel; sample 19 cannot be decoded."""

    def pixels(self, samples):
        if 19 in samples:
            raise UserError("data.source: sample 19 cannot be decoded")
        pixels = super().pixels(samples).copy()
        pixels[:, 0, 0] = list(os.getpid().to_bytes(3, "big"))
        return pixels


@pytest.fixture
def loader():
    generator = np.random.default_rng(0)
    images = {
        split: Recorded(
            generator.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8), np.arange(20), [str(label) for label in range(20)]
        )
        for split in ("train", "val", "test")
    }
    batches = BatchLoader(images, CropFlip(8, padding=1), num_workers=2)
    yield batches
    batches.close()


def processes(batches):
    return {int.from_bytes(batch.images[0, :, 0, 0].numpy().tobytes(), "big") for batch in batches}


def test_the_same_processes_prepare_every_epoch_and_split(loader):
    first = processes(loader.load("val", SHARES[:4]))
    assert len(first) == 2 and os.getpid() not in first
    for _ in range(3):
        assert processes(loader.load("test", SHARES[:4])) == first
        assert processes(loader.load("train", SHARES[:4], is_augmented=False)) == first
    loader.close()
    assert not any(psutil.pid_exists(process) for process in first)
    again = processes(loader.load("val", SHARES[:4]))
    assert len(again) == 2 and not again & first


def test_training_samples_are_augmented_and_others_are_not(loader):
    own = BatchLoader(loader.images, loader.transform)
    for arguments in (("train",), ("val",), ("test",)):
        for one, other in zip(loader.load(*arguments, SHARES[:4]), own.load(*arguments, SHARES[:4]), strict=True):
            assert one.index.equal(other.index) and one.view == other.view == 3
            assert one.images[..., 2:, 2:].equal(other.images[..., 2:, 2:]) or arguments == ("train",)
    images, (indices, view) = loader.images["train"], SHARES[0]
    plain, augmented = (next(own.load("train", SHARES, is_augmented=flag)).images for flag in (False, True))
    assert np.array_equal(plain.permute(0, 2, 3, 1).numpy(), images.pixels(indices))
    assert np.array_equal(augmented.permute(0, 2, 3, 1).numpy(), loader.transform(images.pixels(indices), indices, view))


def test_an_abandoned_iteration_leaves_nothing_behind(loader):
    next(loader.load("train", SHARES[:4]))
    with pytest.raises(UserError, match="sample 19"):
        list(loader.load("val", SHARES))
    assert [batch.index.tolist() for batch in loader.load("test", SHARES[:3])] == [share.tolist() for share, _ in SHARES[:3]]


def test_a_second_iteration_ends_the_first_with_an_error(loader):
    first = loader.load("train", SHARES[:4])
    next(first)
    list(loader.load("val", SHARES[:4]))
    with pytest.raises(RuntimeError, match="a second iteration has started"):
        next(first)


def test_workers_of_a_loader_in_a_reference_cycle_are_stopped_at_once(loader):
    before = {process.pid for process in psutil.Process().children()}
    own = BatchLoader(loader.images, loader.transform, num_workers=2)
    with pytest.raises(UserError) as raised:
        list(own.load("val", SHARES))
    workers = {process.pid for process in psutil.Process().children()} - before
    assert len(workers) == 2
    own.cycle = (own, raised)
    del own, raised
    started_at = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - started_at < 3
    assert not any(psutil.pid_exists(process) for process in workers)
